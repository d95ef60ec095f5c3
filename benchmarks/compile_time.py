"""What the pass adds to the compile time of a 24-layer model: seconds in the pass against those of Dynamo and Inductor."""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor, nn

import fx_passes.backend as backend_module
from fx_passes import SUSBackend


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        n = x.shape[1]
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--compiler", default="inductor")
    args = parser.parse_args()
    model = nn.Sequential(*(Block(64, 4) for _ in range(args.layers)))
    spent = [0.0]
    original = backend_module.rewrite_graph

    def timed(*a: Any, **k: Any) -> Any:
        start = time.perf_counter()
        result = original(*a, **k)
        spent[0] += time.perf_counter() - start
        return result

    backend_module.rewrite_graph = timed
    backend = SUSBackend(c=16, compiler=args.compiler)
    start = time.perf_counter()
    torch.compile(model, backend=backend)(torch.randn(2, 64, 64)).sum().backward()
    total = time.perf_counter() - start
    share = 100 * spent[0] / (total - spent[0])
    print(
        f"{backend.report.rewritten} attentions; pass {spent[0]:.2f} s, the rest {total - spent[0]:.2f} s: {share:.1f}% added"
    )


if __name__ == "__main__":
    main()
