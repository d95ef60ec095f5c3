"""Time until the second training step, where it goes, and the time of a step after it.

    python benchmarks/compile_time.py --layers 24 --modules attention

Each run is a process of its own with an empty cache of Inductor; `--warm` runs twice and reports the second run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from torch import Tensor, nn


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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import lightning.pytorch as pl
    from torch._dynamo.utils import calculate_time_spent

    import fx_passes.backend as backend_module
    from fx_passes import SUSBackend
    from sus_lightning.compilation import plan

    spent = [0.0]
    original = backend_module.rewrite_graph

    def timed(*a: Any, **k: Any) -> Any:
        start = time.perf_counter()
        result = original(*a, **k)
        spent[0] += time.perf_counter() - start
        return result

    backend_module.rewrite_graph = timed
    torch.manual_seed(0)
    root = pl.LightningModule()
    root.model = Model(args.layers, args.width).to(args.device)
    backend = SUSBackend(c=30, compiler=args.compiler)
    plan(root, backend, "attention" if args.modules == "attention" else None).enable()
    optimizer = torch.optim.AdamW(root.parameters())
    tokens = torch.randint(256, (args.batch, args.length), device=args.device)
    times = []
    for _ in range(2 + args.steps):
        start = time.perf_counter()
        loss = nn.functional.cross_entropy(root.model(tokens).flatten(0, 1).float(), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        float(loss.detach())  # waits for the device
        times.append(time.perf_counter() - start)
    assert backend.report.rewritten == args.layers
    parts = calculate_time_spent()
    inductor, compiler = parts.get("inductor_compile", 0.0), parts.get("backend_compile", 0.0)
    lazy = parts.get("entire_backward_compile", 0.0)
    return {
        "until_second_step_s": sum(times[:2]),
        "dynamo_s": parts.get("entire_frame_compile", 0.0) - compiler,
        "pass_s": spent[0],
        "aot_s": max(0.0, compiler + lazy - inductor - spent[0]),
        "inductor_s": inductor,
        "step_ms": 1e3 * sorted(times[2:])[args.steps // 2] if args.steps else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=5, help="timed after the second")
    parser.add_argument("--compiler", default="inductor", choices=["inductor", "aot_eager", "eager"])
    parser.add_argument("--modules", default="all", choices=["all", "attention"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--warm", action="store_true", help="with the caches that an equal run has left")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        for _ in range(1 + args.warm):
            done = subprocess.run(
                [sys.executable, *sys.argv, "--child"], env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
    settings = {k: v for k, v in vars(args).items() if k != "child"}
    result = {k: v if v is None else round(v, 2) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    print(json.dumps({**settings, "threads": torch.get_num_threads(), **result}))


if __name__ == "__main__":
    main()
