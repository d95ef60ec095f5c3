"""Softmax in its spellings: the operator, exp of log_softmax or of x - logsumexp(x), exp over its own sum."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from fx_passes.canonicalise.axes import Dim, FailedMatch, Layout, broadcast, leaves, resolve
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.operators import CLAMPS_BELOW, LARGEST
from fx_passes.canonicalise.views import before, is_cast, is_same, is_view
from fx_passes.find.trace import Value

aten = torch.ops.aten


def through(value: Value) -> Value:
    """The value above casts and copies."""
    while value.op is not None and (is_same(value) or is_cast(value)):
        value = value.args[0]
    return value


_PURE = {
    operator.getitem,
    aten.exp.default,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.detach.default,
    aten.amax.default,
    aten.max.dim,
}


def same(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two values are one and the same, or computed twice in the same way."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return type(a) is type(b) and bool(a == b)
    a, b = through(a), through(b)
    if a is b or a.op is not b.op or a.op not in _PURE or not depth:
        return a is b
    if len(a.args) != len(b.args) or a.kwargs or b.kwargs:
        return False
    return all(same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def softmax_input(value: Value) -> tuple[Value, int] | None:
    """What a value is the softmax of, and over which dimension; None where it is no normalised softmax by itself."""
    if value.op is aten.softmax.int:
        return value.args[0], value.args[1] % len(value.shape)
    if value.op is aten.exp.default:
        inner = through(value.args[0])
        if inner.op is aten.log_softmax.int:
            return inner.args[0], inner.args[1] % len(value.shape)
        if inner.op is aten.sub.Tensor and isinstance(inner.args[1], Value):
            return _minus_logsumexp(inner)
    return None


def _minus_logsumexp(value: Value) -> tuple[Value, int] | None:
    total = through(value.args[1])
    if total.op is aten.log.default:
        return _minus_log_of_sum(value, through(total.args[0]))
    squeezed = False
    if total.op is aten.unsqueeze.default:
        squeezed, dim, total = True, total.args[1] % len(value.shape), through(total.args[0])
    if total.op is not aten.logsumexp.default or not same(total.args[0], value.args[0]):
        return None
    dims, keepdim = total.args[1], len(total.args) > 2 and total.args[2]
    if len(dims) != 1 or bool(keepdim) == squeezed:
        return None
    over = dims[0] % len(value.shape)
    return None if squeezed and dim != over else (value.args[0], over)


def _minus_log_of_sum(value: Value, total: Value) -> tuple[Value, int] | None:
    """``x - exp(x).sum(dim, keepdim=True).log()``."""
    if total.op is not aten.sum.dim_IntList or len(total.args) < 3 or not total.args[2] or len(total.args[1]) != 1:
        return None
    inner = through(total.args[0])
    if inner.op is not aten.exp.default or not same(inner.args[0], value.args[0]):
        return None
    return value.args[0], total.args[1][0] % len(value.shape)


def divisor(value: Value, layout: Layout) -> Operand | None:
    """What a value is one over, through views and casts."""
    while value.op is not None:
        if is_view(value):
            layout = before(value, layout)
        elif value.op is aten.reciprocal.default or (value.op is aten.pow.Tensor_Scalar and value.args[1] == -1):
            return Operand(value.args[0], layout)
        elif not is_cast(value) and not (value.op is aten.mul.Tensor and value.args[1] == 1):
            return None
        value = value.args[0]
    return None


@dataclass(frozen=True)
class RowSum:
    """A sum over `summed`, the axes of the keys, plus a number, plus a tensor that does not run over them."""

    summed: Dim
    extra: float = 0.0
    other: Operand | None = None


def row_sum(
    denominator: Value, layout: Layout, numerator: Value, numerator_layout: Layout, keys: Dim | None
) -> RowSum | None:
    """Whether `denominator` is the sum of `numerator` over some of its axes, and perhaps a number; else None.

    Args:
        denominator, layout: the divisor and its layout.
        numerator, numerator_layout: what was divided, and its layout.
        keys: if given, the axes must be these.
    """
    value, extra, other = denominator, 0.0, None
    while value.op is not aten.sum.dim_IntList:
        if other is None and (sides := _summands(value)) is not None:
            other = Operand(sides[1], broadcast(layout, sides[1].shape))
            layout, value = broadcast(layout, sides[0].shape), sides[0]
            continue
        if is_view(value):
            layout = before(value, layout)
        elif value.op is aten.add.Tensor and isinstance(value.args[1], (int, float)) and not value.kwargs:
            extra += float(value.args[1])
        elif not is_cast(value) and not (value.op in CLAMPS_BELOW and _is_idle(value, numerator)):
            return None
        value = value.args[0]
        if value.op is None:
            return None
    if not value.args[1] or not same(value.args[0], numerator) or extra < 0:
        return None
    rank = len(value.args[0].shape)
    dims = {d % rank for d in value.args[1]}
    rest = layout
    if len(value.args) > 2 and bool(value.args[2]):
        rest = tuple(dim for i, dim in enumerate(layout) if i not in dims)
    if rank != len(numerator_layout):
        return None
    left = tuple(dim for i, dim in enumerate(numerator_layout) if i not in dims)
    summed = leaves(axis for i, dim in enumerate(numerator_layout) if i in dims for axis in dim)
    if resolve(left) != resolve(rest) or (keys is not None and set(leaves(keys)) != set(summed)):
        return None
    return RowSum(summed, extra, other)


def _summands(value: Value) -> tuple[Value, Value] | None:
    """The operands of a sum of two tensors of which one is a sum over an axis, that one first."""
    if value.op is not aten.add.Tensor or value.kwargs or not isinstance(value.args[1], Value):
        return None
    for total, other in (value.args, reversed(value.args)):
        inner = total
        while is_view(inner) or is_cast(inner):
            inner = inner.args[0]
        if inner.op is aten.sum.dim_IntList:
            return total, other
    return None


def _is_idle(clamp: Value, numerator: Value) -> bool:
    """Whether a clamp of a row sum changes nothing: the largest term of a row is exp(0), hence the sum at least 1."""
    numerator = through(numerator)
    if numerator.op is not aten.exp.default or not isinstance(clamp.args[1], (int, float)) or clamp.args[1] > 1:
        return False
    shifted = through(numerator.args[0])
    if len(clamp.args) > 2 and clamp.args[2] is not None:
        return False
    if shifted.op is not aten.sub.Tensor or not isinstance(shifted.args[1], Value) or shifted.kwargs:
        return False
    top = through(shifted.args[1])
    while top.op in (aten.detach.default, operator.getitem):
        top = top.args[0]
    return top.op in LARGEST and same(top.args[0], shifted.args[0])


def through_views(operand: Operand) -> Operand:
    """What an operand is a view or cast of, as far as its axes can be followed."""
    value, layout = operand.value, operand.layout
    while is_view(value) or is_cast(value):
        try:
            layout = before(value, layout) if is_view(value) else layout
        except FailedMatch:
            break
        value = value.args[0]
    return Operand(value, layout)
