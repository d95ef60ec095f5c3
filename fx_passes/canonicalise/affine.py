"""Masks that compare positions, proven by their form.

Such as ``i >= j``, ``i - j < 4096``, ``(j < 7) | (i >= j)`` and ``i // 64 == j // 64``.

Nothing is evaluated, so that the size of the mask does not matter, and symbolic sizes need no check at run time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fx_passes.canonicalise.axes import Dim, Layout, all_axes, broadcast, known, leaves
from fx_passes.canonicalise.forms import Walk
from fx_passes.canonicalise.operators import ANDS, NOTS, ORS
from fx_passes.canonicalise.positional_mask import PositionalMask, both
from fx_passes.canonicalise.views import before, is_view
from fx_passes.find.trace import Value

aten = torch.ops.aten
_ANDS = ANDS | {aten.mul.Tensor}
# a >= b as the sign of a - b, and whether equality counts
_COMPARES = {
    aten.ge.Tensor: (1, True), aten.ge.Scalar: (1, True), aten.gt.Tensor: (1, False), aten.gt.Scalar: (1, False),
    aten.le.Tensor: (-1, True), aten.le.Scalar: (-1, True), aten.lt.Tensor: (-1, False), aten.lt.Scalar: (-1, False),
}  # fmt: skip
_ARANGES = {aten.arange.default: 1, aten.arange.start: 2, aten.arange.start_step: 3}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


class Comparison:
    """Reads conditions over the positions of `rows` and `keys`, one axis each."""

    def __init__(self, walk: Walk, rows: Dim, keys: Dim) -> None:
        self.walk, self.rows, self.keys = walk, leaves(rows), leaves(keys)
        self.positions: list[Value] | None = None  # where a list: tensors whose values are taken for positions

    def positional(self, value: Value, layout: Layout, want: bool) -> PositionalMask | None:
        """The keys visible where ``value == want``; None where that is not known to be a mask of positions."""
        if len(self.rows) != 1 or len(self.keys) != 1 or value.dtype != torch.bool:
            return None
        truth = self._truth(value)
        if truth is not None:
            return PositionalMask() if truth == want else None
        if is_view(value):
            return self.positional(value.args[0], before(value, layout), want)
        if value.op in NOTS:
            return self.positional(value.args[0], layout, not want)
        if value.op in _ANDS | ORS and all(isinstance(x, Value) and x.dtype == torch.bool for x in value.args[:2]):
            sides = [(x, broadcast(layout, x.shape)) for x in value.args[:2]]
            if (value.op in _ANDS) == want:
                first, second = (self.positional(x, side, want) for x, side in sides)
                return None if first is None or second is None else both(first, second)
            return self._either(sides, want)
        if value.op in (aten.eq.Tensor, aten.ne.Tensor) and (value.op is aten.eq.Tensor) == want:
            return self._chunks(value, layout)
        bounds = self._bounds(value, layout, want)
        found: PositionalMask | None = None
        for a, b, c in bounds or ():  # a * i + b * j <= c
            if (a, b) == (-1, 1):
                place = self._band("right", c)
            elif (a, b) == (1, -1):
                place = self._band("left", c)
            else:
                return None
            if place is None:
                return None
            found = place if found is None else both(found, place)
        return found

    def _fixed(self, x: Any) -> Any:
        """A number as an int. A symbolic one that is no length, such as a window, is fixed by that."""
        x = _number(x)
        lengths = {
            s for axis in (*self.rows, *self.keys) if not isinstance(axis.size, int) for s in _symbols(axis.size)
        }
        return int(x) if isinstance(x, torch.SymInt) and not _symbols(x) & lengths else x

    def _band(self, side: str, c: Any) -> PositionalMask | None:
        c = self._fixed(c)
        if isinstance(c, int):
            return PositionalMask(right=c) if side == "right" else PositionalMask(left=c)
        offset = _number(c - (self.keys[0].size - self.rows[0].size) * (1 if side == "right" else -1))
        if not isinstance(offset, int):
            return None
        return replace(
            PositionalMask(right=offset) if side == "right" else PositionalMask(left=offset), bottom_right=True
        )

    def _truth(self, value: Value) -> bool | None:
        """What a condition that is the same everywhere says."""
        if not all(known(n == 1) for n in value.shape):
            return None
        found = self.walk.constants.evaluate(value)
        return None if found is None or self.walk.constants.buffers.get(value) else bool(found)

    def _either(self, sides: list[tuple[Value, Layout]], want: bool) -> PositionalMask | None:
        """A band, or else a key of a prefix."""
        truths = [self._truth(x) for x, _ in sides]
        if (not want) in truths:  # `or_masks` begins with nothing
            return self.positional(*sides[1 - truths.index(not want)], want)
        for (x, inner), (y, outer) in (sides, reversed(sides)):
            bounds = self._bounds(x, inner, want)
            if bounds and len(bounds) == 1 and bounds[0][:2] == (0, 1):
                prefix, band = self._fixed(bounds[0][2]), self.positional(y, outer, want)
                if isinstance(prefix, int) and band is not None and not band.prefix and band.chunk is None:
                    return replace(band, prefix=prefix + 1) if prefix >= 0 else band
        return None

    def _chunks(self, value: Value, layout: Layout) -> PositionalMask | None:
        """``i // size == j // size``"""
        found: dict[bool, Any] = {}
        for x in value.args[:2]:
            if not isinstance(x, Value):
                return None
            side = broadcast(layout, x.shape)
            while is_view(x):
                side, x = before(x, side), x.args[0]
            floor = x.op is aten.floor_divide.default or (
                x.op is aten.div.Tensor_mode and x.kwargs.get("rounding_mode") == "floor"
            )
            size = self._fixed(self._constant(x.args[1])) if floor else None
            inner = self._affine(x.args[0], broadcast(side, x.args[0].shape)) if isinstance(size, int) else None
            if inner is None or inner[:2] not in ((1, 0), (0, 1)) or _number(inner[2]) != 0:
                return None
            found[inner[0] == 1] = size
        return PositionalMask(chunk=found[True]) if len(found) == 2 and found[True] == found[False] > 0 else None

    def _bounds(self, value: Value, layout: Layout, want: bool) -> list[tuple[int, int, Any]] | None:
        """A comparison as inequalities ``a * i + b * j <= c``, all of which must hold."""
        if is_view(value):
            return self._bounds(value.args[0], before(value, layout), want)
        if value.op in NOTS:
            return self._bounds(value.args[0], layout, not want)
        if value.op not in _COMPARES:
            return None
        sign, equal = _COMPARES[value.op]
        if not want:
            sign, equal = -sign, not equal
        first, second = value.args[:2]
        if sign > 0:
            first, second = second, first  # first <= second
        strict = 0 if equal else 1
        inner, side = self._abs(first, layout)
        if inner is not None:
            limit, x = self._side(second, layout), self._affine(inner, side)
            if limit is None or x is None or limit[:2] != (0, 0):
                return None
            c = limit[2] - strict
            return [(x[0], x[1], c - x[2]), (-x[0], -x[1], c + x[2])]
        a, b = self._side(first, layout), self._side(second, layout)
        if a is None or b is None:
            return None
        return [(a[0] - b[0], a[1] - b[1], b[2] - a[2] - strict)]

    def _abs(self, value: Any, layout: Layout) -> tuple[Value | None, Layout]:
        side = layout if not isinstance(value, Value) else broadcast(layout, value.shape)
        while isinstance(value, Value) and is_view(value):
            side, value = before(value, side), value.args[0]
        if isinstance(value, Value) and value.op is aten.abs.default:
            return value.args[0], side
        return None, side

    def _side(self, value: Any, layout: Layout) -> tuple[int, int, Any] | None:
        if isinstance(value, Value):
            return self._affine(value, broadcast(layout, value.shape))
        return (0, 0, value) if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None

    def _affine(self, value: Value, layout: Layout) -> tuple[int, int, Any] | None:
        """An integer value as ``a * i + b * j + c``."""
        if not isinstance(value.fake, torch.Tensor) or value.dtype not in _INTEGERS:
            return None
        constant = self._constant(value)
        if constant is not None:
            return 0, 0, constant
        if is_view(value):
            return self._affine(value.args[0], before(value, layout))
        if value.op in (aten._to_copy.default, aten.detach.default):  # integers have no gradient
            return self._affine(value.args[0], layout)
        if value.op in _ARANGES:
            return self._places_of_arange(value, layout)
        if value.op is aten.index.Tensor and self.positions is not None:
            return self._position(value, layout)
        if value.op is aten.neg.default:
            x = self._affine(value.args[0], layout)
            return None if x is None else (-x[0], -x[1], -x[2])
        if value.op in (aten.add.Tensor, aten.sub.Tensor):
            x, y = self._side(value.args[0], layout), self._side(value.args[1], layout)
            alpha = value.kwargs.get("alpha", 1)
            if x is None or y is None or alpha != 1:
                return None
            sign = 1 if value.op is aten.add.Tensor else -1
            return x[0] + sign * y[0], x[1] + sign * y[1], x[2] + sign * y[2]
        return None

    def _position(self, value: Value, layout: Layout) -> tuple[int, int, Any] | None:
        """``positions[b, i]`` as i: whoever asks has to see that their distances are the same."""
        indices = value.args[1]
        last = indices[-1]
        if len(indices) != len(value.args[0].shape) or any(x is None for x in indices) or self.positions is None:
            return None
        self.positions.append(value)
        return self._affine(last, broadcast(layout, last.shape))

    def _places_of_arange(self, value: Value, layout: Layout) -> tuple[int, int, Any] | None:
        given = value.args[: _ARANGES[value.op]]
        start = given[0] if len(given) > 1 else 0
        step = given[2] if len(given) > 2 else 1
        axes = all_axes(layout)
        if len(axes) != 1 or axes[0].at is not None or step != 1 or not known(value.shape[0] == axes[0].size):
            return None
        if axes[0] is self.rows[0]:
            return 1, 0, start
        return (0, 1, start) if axes[0] is self.keys[0] else None

    def _constant(self, value: Any) -> int | torch.SymInt | None:
        if not isinstance(value, Value):
            return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None
        if value.shape:
            return None
        found = self.walk.constants.evaluate(value)
        if found is None or self.walk.constants.buffers.get(value):
            return None
        return int(found)


def _symbols(x: torch.SymInt) -> set[Any]:
    return set(x.node.expr.free_symbols)


def _number(x: Any) -> Any:
    """A symbolic number that is a constant, as an int."""
    if isinstance(x, torch.SymInt):
        found = x.node.maybe_as_int()
        return x if found is None else found
    return x
