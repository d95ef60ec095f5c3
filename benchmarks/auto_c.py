#!/usr/bin/env python
"""What c="auto" chooses on a real model, and how much training advances per second there and at fixed c.

    python benchmarks/auto_c.py --n 2048 --steps 120 --every 10
    OMP_NUM_THREADS=1 python benchmarks/auto_c.py --cpu-time --smollm2 --batch-size 1 --steps 4 --every 1 --rounds 2

Trains with `SUSBackprop()` on the example's data; after the last step, on batches to come, exact and SUS passes at the
chosen c and at 30, 100, 300 take turns in one process, in an order that rotates: the medians of their ratios are the
speed-ups of a step, and the same passes give the variance. Net speed-up: divided by the penalty 1 + r x / (1 + x).
With --cpu-time all clocks, the controller's too, count the CPU's time in place of the wall's, for machines that others
use: only with one thread. Writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from attention import RESULTS, environment
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from sus_lightning import SUSBackprop, timing  # noqa: E402
from sus_lightning.landscape import penalty  # noqa: E402

FIXED = (30.0, 100.0, 300.0)


class Compare(L.Callback):
    """After the training steps: probes at the chosen and at the fixed c on further batches."""

    def __init__(self, sus: SUSBackprop, data: list[Any]) -> None:
        self.sus, self.data, self.rounds = sus, data, list[dict[str, float]]()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        last = self.sus._account.probes[-1:]
        if last and last[0]["step"] == trainer.global_step - 1:
            print(f"step {trainer.global_step - 1}: c = {last[0]['c']:g} -> {self.sus.c:g}, {last[0]}", flush=True)
        if batch_idx + 1 < trainer.num_training_batches:
            return
        probe, backend, chosen = self.sus._probe, self.sus.backend, self.sus.schedule(trainer.global_step)
        compared = list(dict.fromkeys((self.sus.schedule._finite, *FIXED)))
        backend.c = math.inf  # the probe's first draw is one more exact pass
        earlier = batch
        for i, following in enumerate(self.data):
            at: dict[float, dict[int, float]] = {c: {} for c in compared[i % len(compared) :] + compared}
            values = probe(following, batch_idx, [(earlier, batch_idx)], at=at)
            earlier = following
            self.rounds.append({k: v for k, v in values.items() if "_of/" not in k})
            times = ", ".join(f"c = {c:g} {values[f'at/{c!r}/step_seconds']:.2f} s" for c in compared)
            print(f"round {i}: exact {values['exact_step_seconds']:.2f} s, {times}", flush=True)
        backend.c = chosen


def at_c(rounds: list[dict[str, float]], c: float, noise_scale: float) -> dict[str, float]:
    prefix = f"at/{c!r}/"
    spread = sum(r["batch_variance"] for r in rounds)
    variance = sum(r[prefix + "sus_variance"] for r in rounds) / spread
    speedup = median(r["exact_step_seconds"] / r[prefix + "step_seconds"] for r in rounds)
    return {
        "c": c,
        "step_speedup": speedup,
        "relative_variance": variance,
        "worst_relative_variance": median(r[prefix + "worst_relative_variance"] for r in rounds),
        "penalty": penalty(variance, noise_scale),
        "net_speedup": speedup / penalty(variance, noise_scale),
        "kept_per_row": sum(r[prefix + "kept_per_row"] for r in rounds) / len(rounds),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smollm2", action="store_true", help="the pretrained model instead of the byte model")
    p.add_argument("--n", type=int, default=2048)
    p.add_argument("--batch-size", type=int, default=2)
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--every", type=int, default=10, help="steps between probes: fewer than the default's 200")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--compiler", default="inductor")
    p.add_argument("--cpu-time", action="store_true")
    a = p.parse_args()
    if a.cpu_time:
        if torch.get_num_threads() > 1:
            raise SystemExit("--cpu-time needs one thread: OMP_NUM_THREADS=1")
        timing.time = SimpleNamespace(perf_counter=time.process_time)
    L.seed_everything(0)
    count = (a.steps + a.rounds) * a.batch_size
    if a.smollm2:
        from finetune_smollm2 import FineTuning, pretrained, windows

        model, tokenizer = pretrained()
        module, data = FineTuning(model, 1e-5), windows(tokenizer, a.n, count)
    else:
        from train_lm import ByteLM, Training, Windows, standard_library

        module, data = Training(ByteLM(), 2e-3, a.steps), Windows(standard_library()[0], a.n, count, 1)
    batches = list(DataLoader(data, a.batch_size))
    sus = SUSBackprop(compiler=a.compiler, variance_every_n_steps=a.every)
    compare = Compare(sus, batches[a.steps :])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    # The last callback: the comparison comes after the callback's own work at the end of a batch.
    trainer = L.Trainer(max_epochs=1, callbacks=[sus, compare], enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(batches[: a.steps], batch_size=None))
    rounds, schedule = compare.rounds, sus.schedule
    squared = sum(r["squared_gradient"] for r in rounds)
    noise_scale = sum(r["batch_variance"] for r in rounds) / squared if squared > 0 else math.inf
    finite = schedule._finite
    rows = [at_c(rounds, c, noise_scale) for c in dict.fromkeys((finite, *FIXED))]
    rows.append({"c": "inf", "step_speedup": 1.0, "relative_variance": 0.0, "penalty": 1.0, "net_speedup": 1.0})
    chosen = "inf" if math.isinf(schedule(a.steps)) else finite
    auto = next(row["net_speedup"] for row in rows if row["c"] == chosen)
    summary = {k: (str(v) if isinstance(v, tuple) else v) for k, v in vars(sus.summary).items()}
    result = {
        "settings": vars(a),
        "threads": torch.get_num_threads(),
        "chosen": chosen,
        "c over time": [[step, str(c)] for step, c in sus.summary.c],
        "noise_scale": noise_scale,
        "rows": rows,
        "auto over best": auto / max(row["net_speedup"] for row in rows),
        "summary": summary,
        "rounds": [{k: round(v, 4) for k, v in r.items() if k.endswith("step_seconds")} for r in rounds],
    }
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=1, default=str))
    name = f"auto-c-{'smollm2' if a.smollm2 else 'bytes'}-{a.n}.json"
    (RESULTS / name).write_text(json.dumps({"environment": environment("cpu"), **result}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
