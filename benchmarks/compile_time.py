"""CPU time until the second training step, where it goes, and the CPU time of a step after it.

    python benchmarks/compile_time.py --layers 2 24 --json benchmarks/results/compile-time.json

Each way to compile runs in processes of its own, with a cache of Inductor that is empty at first (cold) and then what
the first run has left (warm). Then all ways take turns in one process, step by step, for the time of a step. Times are
CPU seconds of the process and of the compilers that it starts, with one thread, so that other work on the machine
counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from attention import environment

# name: (compiler, modules)
WAYS: dict[str, tuple[str, Any]] = {
    "whole": ("inductor", ["model"]),
    "blocks": ("inductor", "attention"),
    "whole, aot_eager": ("aot_eager", ["model"]),
    "blocks, aot_eager": ("aot_eager", "attention"),
    "whole, eager": ("eager", ["model"]),
    "blocks, eager": ("eager", "attention"),
}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        n = x.shape[1]
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.layers = nn.ModuleList(Block(width, width // 64) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def cpu_seconds() -> float:
    """Of this process, and of those that it has started and waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


class _CpuClock:
    """The module `time`, for Dynamo's own accounts."""

    def time_ns(self) -> int:
        return int(1e9 * cpu_seconds())

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def steps_of(way: str, layers: int, args: argparse.Namespace) -> Callable[[], None]:
    """A training step of a model that is compiled in this way."""
    import lightning.pytorch as pl

    from fx_passes import SUSBackend
    from sus_lightning.compilation import plan

    compiler, modules = WAYS[way]
    torch.manual_seed(0)
    root = pl.LightningModule()
    root.model = Model(layers, args.width)
    backend = SUSBackend(c=30, compiler=compiler)
    plan(root, backend, modules).enable()
    optimizer = torch.optim.AdamW(root.parameters())
    tokens = torch.randint(256, (args.batch, args.length))

    def step() -> None:
        loss = nn.functional.cross_entropy(root.model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        assert backend.report.rewritten == layers

    return step


def until_second_step(way: str, layers: int, args: argparse.Namespace) -> dict[str, float]:
    import torch._dynamo.utils as dynamo

    import fx_passes.backend as backend_module

    dynamo.time = _CpuClock()  # type: ignore[assignment]
    in_pass = 0.0
    original = backend_module.rewrite_graph

    def timed(*a: Any, **k: Any) -> Any:
        nonlocal in_pass
        start = cpu_seconds()
        result = original(*a, **k)
        in_pass += cpu_seconds() - start
        return result

    backend_module.rewrite_graph = timed
    step = steps_of(way, layers, args)
    start = cpu_seconds()
    step()
    step()
    total = cpu_seconds() - start
    parts = dynamo.calculate_time_spent()
    inductor, compiler = parts.get("inductor_compile", 0.0), parts.get("backend_compile", 0.0)
    lazy = parts.get("entire_backward_compile", 0.0)
    return {
        "until_second_step": total,
        "dynamo": parts.get("entire_frame_compile", 0.0) - compiler,
        "pass": in_pass,
        "aot": max(0.0, compiler + lazy - inductor - in_pass),
        "inductor": inductor,
    }


def steps_in_turn(ways: list[str], layers: int, args: argparse.Namespace) -> dict[str, float]:
    """The median CPU time of a step, in ms."""
    steps = {way: steps_of(way, layers, args) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(2 + args.steps):
        for way, step in steps.items():
            start = time.process_time()
            step()
            if i >= 2:
                seconds[way].append(time.process_time() - start)
    return {way: 1e3 * statistics.median(times) for way, times in seconds.items()}


def in_a_process(args: argparse.Namespace, cache: str, layers: int, *which: str) -> dict[str, float]:
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    sizes = ["--width", args.width, "--batch", args.batch, "--length", args.length, "--steps", args.steps]
    command = [sys.executable, __file__, "--child", *which, "--layers", layers, *sizes]
    done = subprocess.run(
        [str(c) for c in command], env={**variables, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {name: round(value, 2) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 24])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=7, help="timed after the second, in turn; 0 leaves them out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        if len(args.child) == 1:
            result = until_second_step(args.child[0], args.layers[0], args)
        else:
            result = steps_in_turn(args.child, args.layers[0], args)
        print(json.dumps(result))
        return
    settings = {k: getattr(args, k) for k in ("width", "batch", "length", "steps")}
    found: dict[str, Any] = {"environment": environment("cpu"), **settings}
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as shared:
            rows: dict[str, dict[str, Any]] = {}
            for i, way in enumerate(args.ways):
                cache = f"{shared}/{i}"
                rows[way] = {"cold": in_a_process(args, cache, layers, way)}
                if way in ("whole", "blocks"):
                    rows[way]["warm"] = in_a_process(args, cache, layers, way)
                print(layers, way, json.dumps(rows[way]), flush=True)
            if args.steps and len(args.ways) > 1:
                for way, ms in in_a_process(args, f"{shared}/steps", layers, *args.ways).items():
                    rows[way]["step_ms"] = ms
                    print(layers, way, f"{ms:.0f} ms a step", flush=True)
        found[f"{layers} layers"] = rows
        if args.json:
            args.json.parent.mkdir(exist_ok=True)
            args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
