"""Conditions under which keys are visible: a mask as a conjunction of them, and each by value, as a bool [M, N].

~(causal | padding[:, None, None, :])      KeepMask(causal, keep=False), KeepMask(padding, keep=False)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import Dim, Operand, leaves
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.forms import Mask, Walk
from fx_passes.canonicalise.masks.positional import Comparison, PositionalMask
from fx_passes.canonicalise.operators import ANDS, NOTS, ORS
from fx_passes.canonicalise.views import top
from fx_passes.find.calls import is_call
from fx_passes.find.sizes import Sizes, number
from fx_passes.find.trace import Value

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepMask(Operand):
    """A key is visible where ``(value != 0) == keep``; `added` is not 0 where the value is 0 or a mask value."""

    keep: bool
    added: float = 0.0


@dataclass(frozen=True)
class Condition:
    """A mask, and where keys are visible by it: as bool [M, N] or by its form, if positions and constants decide it."""

    seen: KeepMask
    matrix: Tensor | None
    positional: PositionalMask | None = None


def conditions(walk: Walk, mask: Mask, rows: Dim, keys: Dim, sizes: Sizes | None, by_form: bool) -> list[Condition]:
    """What hides the keys that a mask hides. `by_form`: masks of calls are not evaluated if their form tells."""
    if mask.value.dtype.is_floating_point and mask.bias is not None:
        parts = [KeepMask(mask.value, mask.layout, False, mask.fill)]
    else:
        parts = _conjunction(mask, mask.keep)
    found = []
    for seen in parts:
        if by_form and seen.value.home is not None and is_call(seen.value.home):
            positional = Comparison(walk, rows, keys).read(seen, seen.keep)
            if positional is not None or not seen.over(rows) or not seen.over(keys):
                found.append(Condition(seen, None, positional))
                continue
        found.append(Condition(seen, matrix(walk.constants, seen, rows, keys, sizes)))
        if found[-1].matrix is not None:
            walk.buffers |= walk.constants.buffers.get(seen.value, frozenset())
    return found


def _conjunction(x: Operand, want: bool) -> list[KeepMask]:
    """``x == want`` as a conjunction of simpler conditions of that kind."""
    x = top(x, casts=False)
    value, args = x.value, x.value.args
    if value.op is aten._to_copy.default and isinstance(args[0], Value):
        if value.dtype == torch.bool or args[0].dtype == torch.bool:
            return _conjunction(x.side(args[0]), want)
    elif value.op in NOTS and args[0].dtype == torch.bool:
        return _conjunction(x.side(args[0]), not want)
    elif value.op in (aten.eq.Scalar, aten.ne.Scalar) and args[1] == 0:
        return _conjunction(x.side(args[0]), want == (value.op is aten.ne.Scalar))
    elif value.op in (ANDS if want else ORS) and all(isinstance(v, Value) and v.dtype == torch.bool for v in args[:2]):
        return [seen for v in args[:2] for seen in _conjunction(x.side(v), want)]
    return [KeepMask(value, x.layout, want)]


def matrix(constants: Constants, seen: KeepMask, rows: Dim, keys: Dim, sizes: Sizes | None) -> Tensor | None:
    """A mask as bool [M, N], or None if inputs decide it or if it differs along other axes than rows and keys."""
    constant = constants.evaluate(seen.value, sizes)
    axes, mine = [*leaves(rows), *leaves(keys)], seen.axes
    if constant is None or (sizes is None and any(not isinstance(axis.size, int) for axis in (*axes, *mine))):
        return None
    if sizes is not None and seen.added and not bool(((constant == 0) | (constant == seen.added)).all()):
        return None
    visible = (constant != 0) == seen.keep
    size = {axis: number(axis.size, sizes) for axis in (*axes, *mine)}
    others = [axis for axis in mine if axis not in axes]
    wanted = [*others, *(axis for axis in axes if axis in mine)]
    flat = visible.reshape([size[axis] for axis in mine]).permute([mine.index(axis) for axis in wanted])
    flat = flat.reshape([math.prod(size[axis] for axis in others), *flat.shape[len(others) :]])
    if bool((flat != flat[:1]).any()):
        return None
    shape = [size[axis] if axis in mine else 1 for axis in axes]
    expanded = flat[0].reshape(shape).expand([size[axis] for axis in axes])
    return expanded.reshape(length(rows, sizes), length(keys, sizes))


def length(axes: Dim, sizes: Sizes | None) -> int:
    return math.prod(number(axis.size, sizes) for axis in leaves(axes))


def visible(matrices: Iterable[Tensor | None]) -> Tensor:
    """Where keys are visible by all matrices that there are, bool [M or 1, N or 1]."""
    result = torch.ones(1, 1, dtype=torch.bool)
    for found in matrices:
        result = result if found is None else result & found
    return result


def every_row_sees(matrices: Iterable[Tensor | None]) -> bool:
    """Whether constants prove that every row sees a key."""
    matrices = list(matrices)
    return all(m is not None for m in matrices) and bool(visible(matrices).any(-1).all())
