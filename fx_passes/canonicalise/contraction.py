"""Products of two tensors that are summed over an axis: mm, bmm, and an elementwise product with a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fx_passes.canonicalise.axes import Axis, Dim, Layout, before_reduction, broadcast
from fx_passes.canonicalise.operators import MATMULS
from fx_passes.canonicalise.views import is_cast, is_same
from fx_passes.find.trace import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Operand:
    value: Value
    layout: Layout


@dataclass(frozen=True)
class Contraction:
    """``value[layout] = sum over summed of left * right``."""

    value: Value
    layout: Layout
    left: Operand
    right: Operand
    summed: Dim


def is_contraction(value: Value) -> bool:
    return value.op in MATMULS or _product_under_sum(value) is not None


def operands(value: Value) -> tuple[Value, Value]:
    inner = _product_under_sum(value)
    source = value if inner is None else inner
    return source.args[0], source.args[1]


def contraction(value: Value, layout: Layout) -> Contraction:
    """The contraction behind a value with a layout; its summed axes are new."""
    inner = _product_under_sum(value)
    if inner is not None:
        return _multiply_and_sum(value, layout, inner)
    left, right = value.args[0], value.args[1]
    size = left.shape[-1]
    summed: Dim = (Axis(size),)
    batch, (rows, columns) = layout[:-2], layout[-2:]
    return Contraction(
        value,
        layout,
        Operand(left, (*broadcast(batch, left.shape[:-2]), rows, summed)),
        Operand(right, (*broadcast(batch, right.shape[:-2]), summed, columns)),
        summed,
    )


def _product_under_sum(value: Value) -> Value | None:
    if value.op is not aten.sum.dim_IntList or not value.args[1]:
        return None
    inner = value.args[0]
    while isinstance(inner, Value) and (is_same(inner) or is_cast(inner)) and inner.op is not None:
        inner = inner.args[0]
    if inner.op is aten.mul.Tensor and isinstance(inner.args[0], Value) and isinstance(inner.args[1], Value):
        return inner  # type: ignore[no-any-return]
    return None


def _multiply_and_sum(value: Value, layout: Layout, inner: Value) -> Contraction:
    dims = {d % len(inner.shape) for d in value.args[1]}
    full = before_reduction(inner.shape, dims, len(value.args) > 2 and bool(value.args[2]), layout)
    left, right = inner.args[0], inner.args[1]
    summed = tuple(axis for i in sorted(dims) for axis in full[i])
    return Contraction(
        value,
        layout,
        Operand(left, broadcast(full, left.shape)),
        Operand(right, broadcast(full, right.shape)),
        summed,
    )
