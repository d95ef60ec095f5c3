"""Products of two tensors that are summed over an axis: mm, bmm, and an elementwise product with a sum.

torch.bmm(q, k.mT)                                     Contraction(q, k.mT, summed=features)
(q[:, :, None] * k[:, None]).sum(-1)                   Contraction(q[:, :, None], k[:, None], summed=features)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fx_passes.canonicalise.axes import Axis, Dim, Operand, before_reduction, broadcast
from fx_passes.canonicalise.operators import MATMULS
from fx_passes.canonicalise.views import uncast
from fx_passes.find.trace import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """``sum over summed of left * right``."""

    left: Operand
    right: Operand
    summed: Dim


def is_contraction(value: Value) -> bool:
    return value.op in MATMULS or _product_under_sum(value) is not None


def operands(value: Value) -> tuple[Value, Value]:
    source = _product_under_sum(value) or value
    return source.args[0], source.args[1]


def contraction(x: Operand) -> Contraction:
    """The contraction behind a value; its summed axes are new."""
    inner = _product_under_sum(x.value)
    if inner is not None:
        full, dims = before_reduction(x.value, x.layout)
        both = Operand(inner, full)
        summed = tuple(axis for i in dims for axis in full[i])
        return Contraction(both.side(inner.args[0]), both.side(inner.args[1]), summed)
    left, right = x.value.args[0], x.value.args[1]
    summed = (Axis(left.shape[-1]),)
    batch, (rows, columns) = x.layout[:-2], x.layout[-2:]
    return Contraction(
        Operand(left, (*broadcast(batch, left.shape[:-2]), rows, summed)),
        Operand(right, (*broadcast(batch, right.shape[:-2]), summed, columns)),
        summed,
    )


def _product_under_sum(value: Value) -> Value | None:
    if value.op is not aten.sum.dim_IntList or not value.args[1]:
        return None
    inner = uncast(value.args[0])
    return inner if inner.op is aten.mul.Tensor and all(isinstance(x, Value) for x in inner.args) else None
