"""Constants and conditions in operations: numbers that tensors hold, and what masked_fill and where keep."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from fx_passes.canonicalise.axes import Operand
from fx_passes.canonicalise.forms import Mask, Walk
from fx_passes.canonicalise.views import is_cast, is_view, shown
from fx_passes.find.trace import Value

aten = torch.ops.aten


def number_of(walk: Walk, x: Any, buffers: bool = True) -> float | None:
    """A Python number, or what a constant tensor holds in all its elements; `buffers`: also of a buffer."""
    if isinstance(x, (int, float)):
        return float(x)
    if not isinstance(x, Value):
        return None
    filled = x
    while filled.op is aten.detach.default or is_view(filled) or is_cast(filled):
        filled = filled.args[0]
    if filled.op is aten.full.default and isinstance(filled.args[1], (int, float)):
        return float(filled.args[1])  # of any size, also a dynamic one
    constant = walk.constant(x, buffers)
    if constant is None or constant.numel() == 0:
        return None
    first = constant.flatten()[0]
    return float(first) if bool((constant == first).all()) else None


def choices(walk: Walk, x: Operand) -> Iterator[tuple[Value, Mask]]:
    """Readings of masked_fill and where as what is kept, and the mask that sets the rest to a number."""
    if x.value.op in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        kept, condition, fill = x.value.args
        candidates = [(kept, fill, condition, False)]
    else:
        condition, yes, no = x.value.args[:3]
        candidates = [(yes, no, condition, True), (no, yes, condition, False)]
    for kept, fill, condition, keep in candidates:
        number = number_of(walk, fill)
        if number is not None and isinstance(kept, Value):
            yield kept, Mask(condition, x.side(condition).layout, keep, number)


def is_zeros_and_ones(walk: Walk, value: Value) -> bool:
    """Whether a tensor holds nothing but 0 and 1: a bool tensor as numbers, a constant, or a product of such."""
    value = shown(value)
    if value.dtype == torch.bool or (value.op is aten._to_copy.default and value.args[0].dtype == torch.bool):
        return True
    if value.op is aten.mul.Tensor and all(isinstance(x, Value) for x in value.args):
        return all(is_zeros_and_ones(walk, x) for x in value.args)
    constant = walk.constant(value)
    return constant is not None and bool(((constant == 0) | (constant == 1)).all())


def computed(op: Any, *args: Any) -> Value:
    """The result of an operation on values that no node has yet."""
    first = next(x for x in args if isinstance(x, Value))
    with first.fake.fake_mode:
        fake = op(*tree_map(lambda x: x.fake if isinstance(x, Value) else x, args))
    return Value(op, args, {}, fake, home=first.home)
