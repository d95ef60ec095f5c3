"""The features of the op, one case each, for the tests that go through all of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fx_passes.ops.functional import attend
from fx_passes.ops.reference import Dense


@dataclass(frozen=True)
class Case:
    """Sizes, and a function that gives the optional tensors and static arguments."""

    batch: int = 2
    heads: int = 4
    groups: int = 4
    rows: int = 40
    keys: int = 40
    width: int = 16
    value_width: int = 16
    static: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
        """Tensor arguments (floating ones want a gradient), static arguments, and dO."""
        torch.manual_seed(self.seed)
        b, h, g, m, n = self.batch, self.heads, self.groups, self.rows, self.keys

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()

        tensors = {
            "query": normal(b, h, m, self.width),
            "key": normal(b, g, n, self.width),
            "value": normal(b, g, n, self.value_width),
        }
        make = {
            "attn_mask": lambda: ("attn_mask", torch.rand(b, 1, m, n) > 0.3),
            "padding": lambda: ("attn_mask", (torch.arange(n) < torch.randint(n // 2, n, (b, 1))).view(b, 1, 1, n)),
            "empty_row": lambda: ("attn_mask", (torch.arange(m) % 5 > 0).view(1, 1, m, 1)),
            "bias": lambda: ("attn_bias", normal(1, h, m, n)),
            "key_bias": lambda: ("attn_bias", normal(b, 1, 1, n)),
            "uniform_row": lambda: (
                "attn_bias",
                torch.where(torch.arange(m) % 5 == 0, -1e9, 0.0).view(1, 1, m, 1).to(dtype),
            ),
            "sinks": lambda: ("sinks", normal(h)),
            "prefix": lambda: ("prefix", torch.randint(1, n, (b,))),
        }
        for name in self.tensors:
            if name == "uniform_row":  # what float32 makes of the logits there, in every dtype
                tensors["query"].data[:, :, ::5] = 0
            if name == "ids":
                tensors["query_ids"] = torch.arange(m).mul(3).div(m, rounding_mode="floor").expand(b, m)
                tensors["key_ids"] = torch.arange(n).mul(3).div(n, rounding_mode="floor").expand(b, n)
            else:
                key, value = make[name]()
                tensors[key] = value
        return tensors, self.static, torch.randn(b, h, m, self.value_width, dtype=torch.float64).to(dtype)


CASES = {
    "plain": Case(),
    "causal": Case(static={"right": 0}),
    "causal, more rows": Case(rows=50, static={"right": 0}),
    "causal, more keys": Case(keys=70, static={"right": 0}),
    "bottom right": Case(keys=70, static={"right": 0, "bottom_right": True}),
    "bottom right, empty rows": Case(rows=70, static={"right": 0, "bottom_right": True}),
    "window": Case(rows=300, keys=300, batch=1, static={"right": 0, "left": 20}),
    "two-sided window": Case(rows=300, keys=330, batch=1, static={"right": 15, "left": 20}),
    "GQA": Case(groups=2, static={"right": 0}),
    "MQA": Case(groups=1),
    "cross": Case(rows=17, keys=301),
    "value width": Case(value_width=24),
    "mask": Case(tensors=("attn_mask",)),
    "padding": Case(tensors=("padding",), static={"right": 0}),
    "empty rows": Case(tensors=("empty_row",)),
    "uniform rows": Case(tensors=("uniform_row",)),
    "bias": Case(tensors=("bias",), groups=2),
    "key bias": Case(tensors=("key_bias",), static={"right": 0}),
    "bias and mask": Case(tensors=("bias", "attn_mask")),
    "softcap": Case(static={"softcap": 2.0, "right": 0}),
    "sinks": Case(tensors=("sinks",), static={"right": 0}, groups=2),
    "packed": Case(tensors=("ids",), static={"right": 0}),
    "prefix": Case(tensors=("prefix",), static={"right": 0}),
    "scale": Case(static={"scale": 0.7}),
    "one row": Case(rows=1, keys=90),
    "empty batch": Case(batch=0),
    "several tiles": Case(batch=1, heads=1, groups=1, rows=600, keys=2100),
}


def run(
    tensors: dict[str, Tensor], static: dict[str, Any], grad: Tensor, c: float, seed: int = 0, **more: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Out and gradients of the op."""
    out = attend(**tensors, c=torch.tensor(c, dtype=torch.float64), seed=torch.tensor(seed), **static, **more)
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    return out.detach(), dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))


def dense(tensors: dict[str, Tensor], static: dict[str, Any]) -> Dense:
    return Dense(**tensors, **static)
