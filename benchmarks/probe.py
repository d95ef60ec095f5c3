#!/usr/bin/env python
"""Time of a training step with the exact and with the SUS backward, and of a variance probe, in one process.

    python benchmarks/probe.py --n 2048 --batch 1 --repeats 7
    python benchmarks/probe.py --smollm2 --n 2048 --batch 1 --repeats 3

All are uncompiled (the compiler "eager"), interleaved, and medians; the optimizer's step is not in them, which makes
the probe look more expensive than it is. Overhead is a probe's time over that of 200 steps, the default interval.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples"), str(Path(__file__).parent)]

from attention import environment  # noqa: E402

from sus_lightning import SUSBackprop  # noqa: E402

INTERVAL = 200


class Times(L.Callback):
    """Measures in front of the second and last training step."""

    def __init__(self, sus: SUSBackprop, repeats: int) -> None:
        self.sus, self.repeats, self.seconds = sus, repeats, dict[str, list[float]]()

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            return
        parameters = [p for p in module.parameters() if p.requires_grad]
        earlier = [(torch.utils._pytree.tree_map(torch.clone, batch), 0)]

        def step() -> None:
            torch.autograd.grad(module.training_step(batch, batch_idx), parameters)

        for i in range(self.repeats + 1):
            self.sus._disable()
            exact = timed(step)
            self.sus._enable()
            parts = {"exact": exact, "sus": timed(step), "probe": timed(lambda: self.sus._probe(batch, 1, earlier))}
            print(
                "seconds of the CPU: " + "  ".join(f"{name} {value:.2f}" for name, value in parts.items()), flush=True
            )
            for name, seconds in parts.items() if i else ():  # the first round compiles
                self.seconds.setdefault(name, []).append(seconds)


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()  # of the CPU: on a shared machine the clock on the wall counts others too
    run()
    return time.process_time() - start


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--smollm2", action="store_true", help="the pretrained model instead of the byte model")
    p.add_argument("--n", type=int, default=2048)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--c", type=float, default=100.0)
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    L.seed_everything(0)
    if a.smollm2:
        from finetune_smollm2 import FineTuning, pretrained, windows

        model, tokenizer = pretrained()
        module, data = FineTuning(model, 1e-5), windows(tokenizer, a.n, 2 * a.batch)
    else:
        from train_lm import ByteLM, Training, Windows, standard_library

        module, data = Training(ByteLM(), 2e-3, 100), Windows(standard_library()[0], a.n, 2 * a.batch, 1)
    sus = SUSBackprop(c=a.c, compiler="eager", variance_every_n_steps=10**6)
    times = Times(sus, a.repeats)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, callbacks=[sus, times], **quiet)
    trainer.fit(module, DataLoader(data, a.batch))
    exact, step, probe = (median(times.seconds[name]) for name in ("exact", "sus", "probe"))
    print(f"exact / SUS step: {exact / step:.2f}    probe / SUS step: {probe / step:.2f}")
    print(f"overhead of a probe each {INTERVAL} steps: {100 * probe / step / INTERVAL:.2f}%")
    if a.json:
        found = {
            "environment": environment("cpu"),
            "settings": {k: v for k, v in vars(a).items() if k != "json"},
            "seconds": {"exact": exact, "sus": step, "probe": probe},
            "probe over step": probe / step,
            "overhead": probe / step / INTERVAL,
        }
        a.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
