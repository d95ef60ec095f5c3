#!/usr/bin/env python
"""Does it train as well? The exact backward, c = 30, c = 100 and c = "auto" from the same start on the same data.

    OMP_NUM_THREADS=1 python benchmarks/train_quality.py --model byte --state runs/quality       # hours; goes on if cut
    OMP_NUM_THREADS=1 python benchmarks/train_quality.py --model smollm2 --state runs/quality
    python benchmarks/train_quality.py --model byte --state runs/quality --gather                # JSON of what there is

"byte" is the language model of examples/train_lm.py with 1.7 million parameters at n = 4096, with Inductor; "smollm2"
fine-tunes the pretrained SmolLM2-135M at n = 2048, without Inductor; both in bfloat16 mixed precision. The runs of
a seed have the same first weights and the same windows in the same order. Each run writes a line for every step and
every validation, and a checkpoint from which it goes on, to the folder of --state. Validation takes the same windows
of held-out files in every run, each window's loss is kept, and the time it takes is not counted. `--setting again` is
a control: an exact run whose first weights differ in the last digits, which shows how far apart equals come.

Seconds are those of the process's CPU time on one thread, since other programs use the machine; c="auto" chooses by
the same clock. A step in which something is compiled, or that takes over 5 times the run's median (it happened when
the machine had no memory left), counts as the median step; "left out" says how many and their seconds. Probes count.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from attention import RESULTS, environment
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "examples")]

from finetune_smollm2 import FineTuning  # noqa: E402
from train_lm import ByteLM, Training, Windows, standard_library  # noqa: E402

from sus_lightning import SUSBackprop, timing  # noqa: E402

CLOCK = (
    "CPU time of the process, one thread, while other programs used the machine: they slow a run's steps more at some "
    "hours than at others. results/steps-quality.json has the ratio of steps that took turns in one process."
)
SETTINGS = ("exact", "c30", "c100", "auto")
CONTROL = "again"  # exact, from first weights that differ by 1e-6 of themselves: how far equals come apart
SIZES = {
    "byte": {"n": 4096, "steps": 1200, "lr": 2e-3, "warmup": 40, "every": 100, "save": 50, "probe": 40,
             "curve": 8, "final": 32, "precision": "bf16-mixed", "compiler": "inductor"},
    "smollm2": {"n": 2048, "steps": 16, "lr": 5e-5, "warmup": 2, "every": 4, "save": 4, "probe": 3,
                "curve": 4, "final": 4, "precision": "bf16-mixed", "compiler": "eager"},
    "tiny": {"n": 256, "steps": 24, "lr": 2e-3, "warmup": 2, "every": 8, "save": 5, "probe": 5,
             "curve": 2, "final": 4, "precision": "32-true", "compiler": "eager"},
}  # fmt: skip


class Schedule(L.Callback):
    """A learning rate that warms up and then falls to zero, as a line, until the last step."""

    def __init__(self, lr: float, warmup: int, steps: int) -> None:
        self.lr, self.warmup, self.steps = lr, warmup, steps

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        step = trainer.global_step
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.lr * min((step + 1) / self.warmup, 1 - step / self.steps)


class Record(L.Callback):
    """Lines for steps and validations, and checkpoints. Must stand behind SUSBackprop, whose probes it times."""

    def __init__(self, file: Path, size: dict[str, Any], validation: Dataset[Any], keep: bool) -> None:
        self.file, self.size, self.validation, self.keep = file, size, validation, keep
        self.last = self.begun = time.process_time()
        self.compiled = 0.0

    def write(self, **line: Any) -> None:
        with open(self.file, "a") as f:
            f.write(json.dumps(line) + "\n")

    def validate(self, trainer: L.Trainer, module: L.LightningModule, count: int) -> None:
        """With the module as it was given: neither compiled nor with SUS."""
        model = module.model
        model.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            losses = [round(float(loss(model, self.validation[i])), 5) for i in range(count)]
        model.train()
        self.write(step=trainer.global_step, validation=losses)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 0:
            self.validate(trainer, module, self.size["curve"])
            self.last = time.process_time()
        self.begun, self.compiled = time.process_time(), timing.compile_seconds()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        now, step = time.process_time(), trainer.global_step
        sus = next((x for x in trainer.callbacks if isinstance(x, SUSBackprop)), None)
        line = {"step": step, "loss": round(float(outputs["loss"]), 5), "cpu": now - self.begun}
        line |= {"before": self.begun - self.last, "compiled": timing.compile_seconds() > self.compiled}
        if sus is not None:
            line |= {"c": str(sus.c), **{k: v for k, v in sus._variance.items() if k == "relative_variance"}}
        self.write(**line)
        last = step == self.size["steps"]
        if step % self.size["every"] == 0 or last:
            self.validate(trainer, module, self.size["final"] if last else self.size["curve"])
        if step % self.size["save"] == 0 or last:
            new = self.file.with_suffix(".new")
            trainer.save_checkpoint(new)
            new.replace(self.file.with_suffix(".ckpt"))
            if self.keep and step in {self.size["steps"] // 8, self.size["steps"] // 2, self.size["steps"]}:
                torch.save(module.model.state_dict(), self.file.with_name(f"{self.file.stem}-step{step}.pt"))
        self.last = time.process_time()


class Order(Sampler[int]):
    """The windows one after the other, from the one at which the run goes on."""

    def __init__(self, start: int, count: int) -> None:
        self.start, self.count = start, count

    def __iter__(self):
        return iter(range(self.start, self.count))

    def __len__(self) -> int:
        return self.count


def loss(model: torch.nn.Module, window: Any) -> Tensor:
    """By `forward`, since calling the module runs its compiled form."""
    if isinstance(model, ByteLM):
        return torch.nn.functional.cross_entropy(model.forward(window[None, :-1])[0].float(), window[1:])
    (ids,) = window
    return model.forward(input_ids=ids[None], labels=ids[None], use_cache=False).loss


def token_windows(tokenizer: Any, files: list[bytes], n: int, count: int, seed: int) -> TensorDataset:
    """Windows of n tokens, each from another file where there are enough, in an order that the seed fixes."""
    rng = random.Random(seed)
    found: list[list[int]] = []
    while len(found) < count:
        text = rng.choice(files).decode(errors="ignore")
        begin = rng.randrange(max(1, len(text) - 8 * n))
        ids = tokenizer(text[begin : begin + 8 * n]).input_ids
        if len(ids) >= n:
            found.append(ids[:n])
    return TensorDataset(torch.tensor(found))


def problem(name: str, size: dict[str, Any], seed: int) -> tuple[L.LightningModule, Dataset[Any], Dataset[Any]]:
    """The module with its first weights, training windows and validation windows."""
    train, held_out = standard_library()
    L.seed_everything(seed, verbose=False)
    if name == "smollm2":
        from finetune_smollm2 import pretrained

        model, tokenizer = pretrained()
        data = token_windows(tokenizer, train, size["n"], size["steps"], seed + 1)
        return FineTuning(model, size["lr"]), data, token_windows(tokenizer, held_out, size["n"], size["final"], 0)
    model = ByteLM(1, 32, 2) if name == "tiny" else ByteLM(2, 256, 4)
    data = Windows(train, size["n"], size["steps"], seed + 1)
    module = Training(model, size["lr"], size["steps"])
    module.configure_optimizers = lambda: torch.optim.AdamW(
        module.parameters(), size["lr"], betas=(0.9, 0.95), weight_decay=0.1
    )
    return module, data, Windows(held_out, size["n"], size["final"], 0)


def run(name: str, setting: str, seed: int, state: Path) -> None:
    """One run, from its checkpoint if there is one."""
    size, file = SIZES[name], state / f"{name}-{setting}-seed{seed}.jsonl"
    checkpoint = file.with_suffix(".ckpt")
    start = torch.load(checkpoint, weights_only=False, mmap=True)["global_step"] if checkpoint.exists() else 0
    lines = file.read_text().splitlines() if file.exists() and start else []
    file.write_text("".join(x + "\n" for x in lines if json.loads(x).get("step", 0) <= start))
    module, data, validation = problem(name, size, seed)
    callbacks: list[L.Callback] = [Schedule(size["lr"], size["warmup"], size["steps"])]
    if setting == CONTROL:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1 + 1e-6 * torch.randn_like(p))
    if setting not in ("exact", CONTROL):
        c = "auto" if setting == "auto" else float(setting[1:])
        every = size["probe"] if setting == "auto" else 0
        callbacks.append(SUSBackprop(c=c, variance_every_n_steps=every, compiler=size["compiler"]))
    elif size["compiler"] == "inductor":
        module.model.compile()
    record = Record(file, size, validation, keep=name == "byte" and setting == "exact" and seed == 0)
    record.write(step=start, start=environment("cpu"), settings=size)
    trainer = L.Trainer(
        max_epochs=1,
        precision=size["precision"],
        accelerator="cpu",
        callbacks=[*callbacks, record],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, 1, sampler=Order(start, size["steps"]))
    trainer.fit(module, loader, ckpt_path=checkpoint if start else None, weights_only=False)
    record.write(step=size["steps"], done=True)
    if name == "smollm2":
        checkpoint.unlink()  # 1.6 GB


def finished(file: Path) -> bool:
    return file.exists() and '"done"' in file.read_text()


def gathered(file: Path) -> dict[str, Any]:
    """What the lines of a run say: the curve of validation losses over steps and seconds."""
    lines = [json.loads(x) for x in file.read_text().splitlines()]
    steps = [x for x in lines if "cpu" in x]
    usual = median(x["cpu"] for x in steps if not x["compiled"]) if steps else 0.0
    seconds, curve, count = {0: 0.0}, [], next(x["settings"]["curve"] for x in lines if "settings" in x)
    odd = [x["compiled"] or x["cpu"] > 5 * usual for x in steps]
    for x, out in zip(steps, odd, strict=True):
        # Behind a restart, and where something was compiled, the time is no step's.
        probing = x["before"] if x["before"] < 20 * usual else 0.0
        seconds[x["step"]] = seconds[x["step"] - 1] + (usual if out else x["cpu"]) + probing
    for x in lines:
        if "validation" in x:
            first = x["validation"][:count]
            curve.append([x["step"], round(seconds[x["step"]], 2), round(sum(first) / len(first), 5)])
    return {
        "finished": finished(file),
        "steps": len(steps),
        "median step": usual,
        "left out": [sum(odd), round(sum(x["cpu"] for x, out in zip(steps, odd, strict=True) if out), 1)],
        "probes": sum(x["before"] for x in steps if 0.5 * usual < x["before"] < 20 * usual),
        "seconds": seconds[len(steps)],
        "curve": curve,
        "final": next((x["validation"] for x in reversed(lines) if "validation" in x), []) if finished(file) else [],
        "c": [[x["step"], x["c"]] for i, x in enumerate(steps) if "c" in x and (not i or x["c"] != steps[i - 1]["c"])],
        "environment": next(x["start"] for x in lines if "start" in x),
        "settings": next(x["settings"] for x in lines if "settings" in x),
    }


def reached(curve: list[list[float]], loss: float) -> float | None:
    """Seconds until the curve, with lines between its points, is down at the loss; None where it never is."""
    for (_, t0, y0), (_, t1, y1) in pairwise(curve):
        if y1 <= loss:
            return t0 if y0 <= loss else t0 + (t1 - t0) * (y0 - loss) / (y0 - y1)
    return None


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per setting, of the seeds that are finished: final losses, and what the exact run of the same seed compares to.

    "minus exact" has for each seed the mean difference over the validation windows and its standard error over them.
    """
    finals = {(r["setting"], r["seed"]): r for r in runs if r["finished"]}
    rows = []
    for setting in (*SETTINGS, *([CONTROL] if any(r["setting"] == CONTROL for r in runs) else [])):
        mine = [finals[setting, seed] for seed in range(3) if (setting, seed) in finals]
        losses = [fmean(r["final"]) for r in mine]
        row: dict[str, Any] = {"setting": setting, "seeds": [r["seed"] for r in mine], "minus exact": []}
        if mine:
            row |= {"mean": fmean(losses), "lowest": min(losses), "highest": max(losses)}
            row["std"] = stdev(losses) if len(losses) > 1 else None
        for r in (r for r in mine if ("exact", r["seed"]) in finals):
            exact = finals["exact", r["seed"]]
            apart = [a - b for a, b in zip(r["final"], exact["final"], strict=True)]
            error = stdev(apart) / len(apart) ** 0.5
            at = reached(r["curve"], exact["curve"][-1][2])
            row["minus exact"].append(
                {
                    "seed": r["seed"],
                    "difference": fmean(apart),
                    "error": error,
                    "seconds to exact's final loss": at,
                    "exact's seconds": exact["seconds"],
                    "seconds": r["seconds"],
                }
            )
        if row["minus exact"]:
            row["mean difference"] = fmean(x["difference"] for x in row["minus exact"])
        rows.append(row)
    return rows


def gather(name: str, state: Path) -> None:
    files = {(s, seed): state / f"{name}-{s}-seed{seed}.jsonl" for seed in range(3) for s in (*SETTINGS, CONTROL)}
    runs = [{"setting": s, "seed": seed, **gathered(f)} for (s, seed), f in files.items() if f.exists()]
    shared = {key: runs[0][key] for key in ("environment", "settings")}
    for r in runs:
        assert r.pop("settings") == shared["settings"], f"{r['setting']}, seed {r['seed']}: other settings"
        r["commit"] = r.pop("environment")["commit"]
    result = {"model": name, "clock": CLOCK, **shared, "summary": summary(runs), "runs": runs}
    (RESULTS / f"train-quality-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    for r in runs:
        final = sum(r["final"]) / len(r["final"]) if r["final"] else float("nan")
        print(f"{r['setting']:6} seed {r['seed']}: {r['steps']} steps, {r['seconds']:.0f} s, final {final:.4f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=SIZES, required=True)
    p.add_argument("--state", type=Path, required=True, help="folder for lines and checkpoints")
    p.add_argument("--setting", choices=(*SETTINGS, CONTROL), help="this run alone; default: all that are not finished")
    p.add_argument("--seed", type=int, default=0, help="of --setting")
    p.add_argument("--gather", action="store_true", help="write benchmarks/results/train-quality-MODEL.json")
    a = p.parse_args()
    a.state.mkdir(parents=True, exist_ok=True)
    if a.gather:
        gather(a.model, a.state)
    elif a.setting:
        if torch.get_num_threads() > 1:
            raise SystemExit("CPU time is a step's time on one thread only: OMP_NUM_THREADS=1")
        timing.time = SimpleNamespace(perf_counter=time.process_time)
        run(a.model, a.setting, a.seed, a.state)
    else:
        for seed in range(3):
            for setting in SETTINGS:
                if not finished(a.state / f"{a.model}-{setting}-seed{seed}.jsonl"):
                    one = ["--model", a.model, "--state", str(a.state), "--setting", setting, "--seed", str(seed)]
                    subprocess.run([sys.executable, __file__, *one], check=True)


if __name__ == "__main__":
    main()
