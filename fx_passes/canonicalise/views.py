"""Operations that move elements and leave them as they are: the input's layout from the output's, and back.

x.view(b, h, n, d)     result [b, h, n, d] runs over (B), (H), (N), (D); x [b * h, n, d] over (B H), (N), (D)
x[:, None].expand(b, g, n, d)  result [b, g, n, d] runs over (B), (G), (N), (D); x [b, n, d] over (B), (N), (D)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch

from fx_passes.canonicalise.axes import Axis, FailedMatch, Layout, Operand, broadcast, known, reshape, same_shape
from fx_passes.canonicalise.operators import CASTS, COPIES, MOVES, RESHAPES, SQUEEZES
from fx_passes.find.trace import Value

aten = torch.ops.aten
AnyOperand = TypeVar("AnyOperand", bound=Operand)


def is_same(value: Value) -> bool:
    """Whether a value is its first argument, elements and shape, perhaps in another memory layout."""
    if value.op is aten.dropout.default:
        return not value.args[2] or value.args[1] == 0
    if value.op is aten.slice.Tensor:
        return same_shape(value, value.args[0])
    return value.op in COPIES


def is_cast(value: Value) -> bool:
    """Whether a value is its first argument in another floating-point type."""
    return (
        value.op in CASTS
        and value.dtype.is_floating_point
        and value.args[0].dtype.is_floating_point
        and value.fake.device == value.args[0].fake.device
    )


def is_view(value: Value) -> bool:
    return is_same(value) or value.op in RESHAPES or value.op in SQUEEZES or value.op in MOVES or _selects(value)


def above(x: Operand, casts: bool = True) -> Operand | None:
    """What a view or a cast shows; None where a value is neither. FailedMatch: its axes cannot be followed."""
    if is_view(x.value):
        return Operand(x.value.args[0], before(x.value, x.layout))
    return Operand(x.value.args[0], x.layout) if casts and is_cast(x.value) else None


def top(x: Operand, casts: bool = True) -> Operand:
    """What a value shows through views and casts, as far as its axes can be followed."""
    while True:
        try:
            found = above(x, casts)
        except FailedMatch:
            return x
        if found is None:
            return x
        x = found


def shown(value: Value) -> Value:
    """The value above views and casts."""
    while is_view(value) or is_cast(value):
        value = value.args[0]
    return value


def uncast(value: Value) -> Value:
    """The value above casts and copies."""
    while is_same(value) or is_cast(value):
        value = value.args[0]
    return value


def _repeated(value: Value) -> list[Any]:
    """The shape of `repeat`'s result with two dimensions for each: how often it is repeated, and its size before."""
    source, times = value.args[0].shape, value.args[1]
    sizes = (1,) * (len(times) - len(source)) + tuple(source)
    return [n for pair in zip(times, sizes, strict=True) for n in pair]


def _selects(value: Value) -> bool:
    """Whether a value is one place of a dimension."""
    if value.op is not aten.select.int:
        return False
    place, size = value.args[2], value.args[0].shape[value.args[1]]
    return isinstance(place, int) and (place >= 0 or isinstance(size, int))


def chunk_of(value: Value, layout: Layout) -> Layout | None:
    """The layout of a slice's first argument where the slice is one of equal parts, cut or combed; None otherwise."""
    given = (*value.args[1:], *(0, None, None, 1)[len(value.args) - 1 :])
    dim, start, step = given[0], given[1], given[3]
    dim, start = dim % len(value.shape), start or 0
    total, size = value.args[0].shape[dim], value.shape[dim]
    if size == 1 and isinstance(start, int) and start >= 0 and not isinstance(total, int):
        return (*layout[:dim], (Axis(total, at=start), *layout[dim]), *layout[dim + 1 :])
    if not all(isinstance(x, int) for x in (total, size, start, step)) or not size or total % size:
        return None
    start = max(start + total, 0) if start < 0 else start
    mine = layout[dim]
    if step == 1 and start % size == 0:
        mine = (Axis(total // size, at=start // size), *mine)
    elif total == step * size and start < step:
        mine = (*mine, Axis(step, at=start))
    else:
        return None
    return (*layout[:dim], mine, *layout[dim + 1 :])


def before(value: Value, layout: Layout) -> Layout:
    """The layout of the first argument of a view whose result has `layout`."""
    source = value.args[0]
    if is_same(value):
        return layout
    if value.op in RESHAPES:
        return reshape(layout, source.shape)
    if value.op in SQUEEZES:
        rest = iter(layout)
        return tuple(() if i in _squeezed(value) else next(rest) for i in range(len(source.shape)))
    if value.op is aten.unsqueeze.default:
        i = value.args[1] % len(value.shape)
        if layout[i]:
            raise FailedMatch("the single key is a dimension that a view adds")
        return layout[:i] + layout[i + 1 :]
    if value.op is aten.expand.default:
        return broadcast(layout, source.shape)
    if value.op is aten.repeat.default:
        return reshape(layout, _repeated(value))[1::2][len(layout) - len(source.shape) :]
    if value.op is aten.select.int:
        i, size = value.args[1] % len(source.shape), source.shape[value.args[1]]
        place = value.args[2] + size if value.args[2] < 0 else value.args[2]
        chosen = () if known(size == 1) else (Axis(size, at=place),)
        return (*layout[:i], chosen, *layout[i:])
    order = _order(value)
    result: list[Any] = [()] * len(order)
    for i, j in enumerate(order):
        result[j] = layout[i]
    return tuple(result)


def after(value: Value, layout: Layout) -> Layout | None:
    """The layout of a view's result; None where the result runs over other axes than the source."""
    if is_same(value):
        return layout
    if value.op in (aten.select.int, aten.repeat.default):
        return None
    if value.op in RESHAPES:
        return reshape(layout, value.shape)
    if value.op in SQUEEZES:
        return tuple(dim for i, dim in enumerate(layout) if i not in _squeezed(value))
    if value.op is aten.unsqueeze.default:
        i = value.args[1] % len(value.shape)
        return (*layout[:i], (), *layout[i:])
    if value.op is aten.expand.default:
        pad = len(value.shape) - len(layout)
        wide = ((),) * pad + layout
        new = [not dim and not known(size == 1) for dim, size in zip(wide, value.shape, strict=True)]
        return None if any(new) else wide
    return tuple(layout[j] for j in _order(value))


def _squeezed(value: Value) -> set[int]:
    source = value.args[0].shape
    dims: Any = value.args[1] if len(value.args) > 1 else range(len(source))
    dims = [dims] if isinstance(dims, int) else dims
    return {d % len(source) for d in dims if known(source[d % len(source)] == 1)} if source else set()


def _order(value: Value) -> list[int]:
    rank = len(value.shape)
    if value.op is aten.permute.default:
        return [d % rank for d in value.args[1]]
    order = list(range(rank))
    i, j = (0, 1) if value.op is aten.t.default else (value.args[1] % rank, value.args[2] % rank)
    if rank > 1:
        order[i], order[j] = order[j], order[i]
    return order


def peeled(x: AnyOperand) -> AnyOperand:
    """The nearest value above some views that needs no copy of repeated or reordered elements.

    `repeat_interleave` and `expand` of key heads vanish here, for what broadcasts does not depend on the axis.
    """
    chain, costly = [x], 0
    while is_view(x.value) and isinstance(x.value.args[0], Value):
        value, source = x.value, x.value.args[0]
        repeats = value.op is aten.expand.default and not same_shape(value, source)
        copies = repeats or value.op in (aten.clone.default, aten.repeat.default)
        try:
            x = replace(x, value=source, layout=before(value, x.layout))
        except FailedMatch:
            break
        chain.append(x)
        if copies:
            costly = len(chain) - 1
    return next((y for y in chain[costly:] if y.value.node is not None), chain[-1])
