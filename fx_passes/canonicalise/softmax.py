"""Softmax in its spellings: the operator, exp of log_softmax or of a difference with logsumexp, exp over its own sum."""

from __future__ import annotations

import torch

from fx_passes.canonicalise.axes import Dim, Layout, leaves, resolve
from fx_passes.canonicalise.views import before, is_cast, is_same, is_view
from fx_passes.find.trace import Value

aten = torch.ops.aten


def through(value: Value) -> Value:
    """The value above casts and copies."""
    while value.op is not None and (is_same(value) or is_cast(value)):
        value = value.args[0]
    return value


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
    squeezed = False
    if total.op is aten.unsqueeze.default:
        squeezed, dim, total = True, total.args[1] % len(value.shape), through(total.args[0])
    if total.op is not aten.logsumexp.default or through(total.args[0]) is not through(value.args[0]):
        return None
    dims, keepdim = total.args[1], len(total.args) > 2 and total.args[2]
    if len(dims) != 1 or bool(keepdim) == squeezed:
        return None
    over = dims[0] % len(value.shape)
    return None if squeezed and dim != over else (value.args[0], over)


def sum_of(value: Value, layout: Layout) -> tuple[Value, Layout, tuple[int, ...]] | None:
    """For a row sum, seen through views: the summed value, the layout of what is left, and the positions summed.

    The third is a tuple of dimensions of the summed value, not of axes.
    """
    while value.op is not None and value.op is not aten.sum.dim_IntList:
        if is_view(value):
            layout = before(value, layout)
        elif (not is_cast(value) and value.op is not aten.clamp_min.default) or value.op is aten.clamp_min.default:
            return None
        value = value.args[0]
    if value.op is None or not value.args[1]:
        return None
    rank = len(value.args[0].shape)
    dims = tuple(sorted(d % rank for d in value.args[1]))
    keepdim = len(value.args) > 2 and bool(value.args[2])
    rest = tuple(dim for i, dim in enumerate(layout) if i not in dims) if keepdim else layout
    return value.args[0], rest, dims


def is_row_sum(
    denominator: Value, layout: Layout, numerator: Value, numerator_layout: Layout, keys: Dim | None
) -> Dim | None:
    """Whether `denominator` is the sum of `numerator` over some of its axes; these axes, or None.

    Args:
        denominator, layout: the divisor and its layout.
        numerator, numerator_layout: what was divided, and its layout.
        keys: if given, the axes must be these.
    """
    found = sum_of(denominator, layout)
    if found is None or through(found[0]) is not through(numerator):
        return None
    source, rest, dims = found
    if len(source.shape) != len(numerator_layout):
        return None
    left = tuple(dim for i, dim in enumerate(numerator_layout) if i not in dims)
    summed = leaves(axis for i, dim in enumerate(numerator_layout) if i in dims for axis in dim)
    if resolve(left) != resolve(rest) or (keys is not None and set(leaves(keys)) != set(summed)):
        return None
    return summed
