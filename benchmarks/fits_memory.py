"""What stays in memory after each of many fits in one process: with SUS, with plain torch.compile, and in eager code.

    python benchmarks/fits_memory.py --json benchmarks/results/fits-memory.json

Each row is a process of its own that fits new modules of one class one after the other; memory and objects are read
after each fit, when the garbage collector has run. "compile" is `model.compile()` of plain torch.compile in a callback,
whose code Dynamo uses again for the next module of the class; "compile, reset" calls `torch._dynamo.reset()` after each
fit, which is what compiles anew, as every fit with SUS does. The model has two blocks; "breaks" has a graph break in
each.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sus_lightning import SUSBackprop

WAYS = ("eager", "compile", "compile, reset", "sus")
WIDTH, LENGTH = 16, 48


class Block(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.breaks = breaks
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.breaks:
            torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Module(pl.LightningModule):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(32, WIDTH), Block(breaks), Block(breaks), nn.Linear(WIDTH, 32))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


class Compile(pl.Callback):
    def __init__(self, compiler: str) -> None:
        self.compiler = compiler

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.model.compile(backend=self.compiler)


class StepTimes(pl.Callback):
    """CPU seconds of the steps after the second, in which nothing is compiled."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._start = 0.0

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 2:
            self.times.append(time.process_time() - self._start)


def resident() -> float:
    """MiB of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def fits(way: str, compiler: str, breaks: bool, probes: bool, count: int) -> dict[str, float]:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    objects, memory, steps = [], [], []
    batches = DataLoader(torch.randint(32, (64, LENGTH)), batch_size=4)  # type: ignore[arg-type]
    for _ in range(count):
        callbacks: list[pl.Callback] = [StepTimes()]
        if way == "sus":
            every = 4 if probes else 0
            callbacks.append(SUSBackprop(4, compiler=compiler, variance_every_n_steps=every))  # type: ignore[arg-type]
        elif way != "eager":
            callbacks.append(Compile(compiler))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=12,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(breaks), batches)
        steps.append(statistics.median(callbacks[0].times))  # type: ignore[attr-defined]
        del trainer, callbacks
        if way == "compile, reset":
            torch._dynamo.reset()
        gc.collect()
        objects.append(len(gc.get_objects()))
        memory.append(resident())
    warm = count // 4  # the first fits load code
    return {
        "objects_per_fit": round((objects[-1] - objects[warm]) / (count - 1 - warm)),
        "KiB_per_fit": round(1024 * (memory[-1] - memory[warm]) / (count - 1 - warm)),
        "first_step_ms": round(1e3 * statistics.median(steps[warm : 2 * warm]), 2),
        "last_step_ms": round(1e3 * statistics.median(steps[-warm:]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=24)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--compilers", nargs="+", default=["eager", "aot_eager", "inductor"])
    parser.add_argument("--probes", action="store_true", help="probe in each fit with SUS")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        way, compiler, breaks = args.child
        print(json.dumps(fits(way, compiler, breaks == "breaks", args.probes, args.fits)))
        return
    rows: list[dict[str, Any]] = []
    for compiler in args.compilers:
        for shape in ("whole", "breaks"):
            for way in args.ways:
                if way == "eager" and compiler != args.compilers[0]:
                    continue
                more = ["--probes"] if args.probes else []
                command = [sys.executable, __file__, "--child", way, compiler, shape, "--fits", str(args.fits), *more]
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
                )
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({"compiler": compiler, "model": shape, "way": way, **found})
                print(json.dumps(rows[-1]), flush=True)
    if args.json:
        found = {"torch": torch.__version__, "lightning": pl.__version__, "fits": args.fits, "rows": rows}
        args.json.parent.mkdir(exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
