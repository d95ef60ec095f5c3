"""Operations that move elements and leave them as they are: the input's layout from the output's, and back."""

from __future__ import annotations

from typing import Any

import torch

from fx_passes.canonicalise.axes import Axis, FailedMatch, Layout, broadcast, known, reshape
from fx_passes.canonicalise.operators import CASTS, COPIES, MOVES, RESHAPES, SQUEEZES
from fx_passes.find.trace import Value

aten = torch.ops.aten


def is_same(value: Value) -> bool:
    """Whether a value is its first argument, elements and shape, perhaps in another memory layout."""
    if value.op is aten.dropout.default:
        return not value.args[2] or value.args[1] == 0
    if value.op is aten.slice.Tensor:
        return all(known(a == b) for a, b in zip(value.shape, value.args[0].shape, strict=True))
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


def peel(value: Value, layout: Layout) -> tuple[Value, Layout]:
    """The nearest value above some views that needs no copy of repeated or reordered elements, with its layout.

    `repeat_interleave` and `expand` of key heads vanish here, for what broadcasts does not depend on the axis.
    """
    chain = [(value, layout)]
    costly = 0
    while is_view(value) and isinstance(value.args[0], Value):
        copies = value.op in (aten.clone.default, aten.repeat.default) or (
            value.op is aten.expand.default
            and not (
                len(value.shape) == len(value.args[0].shape)
                and all(known(a == b) for a, b in zip(value.shape, value.args[0].shape, strict=True))
            )
        )
        try:
            layout = before(value, layout)
        except FailedMatch:
            break
        value = value.args[0]
        chain.append((value, layout))
        if copies:
            costly = len(chain) - 1
    for candidate in chain[costly:]:
        if candidate[0].node is not None:
            return candidate
    return chain[-1]
