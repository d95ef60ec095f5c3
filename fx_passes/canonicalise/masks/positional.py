"""Masks that are functions of positions alone: bands, prefixes and chunks; proven by value, or by form.

By value, a constant mask is compared with each kind. By form, nothing is evaluated, so that the size of the mask does
not matter, and symbolic sizes need no check at run time:

    i >= j               PositionalMask(right=0)               i - j < 4096         PositionalMask(left=4095)
    (j < 7) | (i >= j)   PositionalMask(right=0, prefix=7)     i // 64 == j // 64   PositionalMask(chunk=64)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import Dim, Operand, known, leaves
from fx_passes.canonicalise.forms import Walk
from fx_passes.canonicalise.operators import ANDS, NOTS, ORS, SUMS
from fx_passes.canonicalise.views import top
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
_Linear = tuple[int, int, Any]  # a * i + b * j + c


@dataclass
class PositionalMask:
    """A mask of positions: a key may lie `left` before and `right` after its query; `prefix` keys are always seen.

    With `bottom_right` positions count from the last query and the last key.
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    chunk: int | None = None
    bottom_right: bool = False

    @property
    def kind(self) -> str:
        parts = ["causal" if self.right == 0 else f"up to {self.right} ahead"] if self.right is not None else []
        parts += [] if self.left is None else [f"window {self.left + 1}"]
        parts += [] if not self.prefix else [f"prefix {self.prefix}"]
        parts += [] if self.chunk is None else [f"chunk {self.chunk}"]
        return ", ".join(parts)

    def visible(self, m: int, n: int) -> Tensor:
        """Bool [m, n]."""
        i, j = torch.arange(m)[:, None] + (n - m if self.bottom_right else 0), torch.arange(n)[None, :]
        seen = torch.ones(m, n, dtype=torch.bool)
        if self.right is not None:
            seen &= j - i <= self.right
        if self.left is not None:
            seen &= i - j <= self.left
        if self.chunk is not None:
            seen &= i // self.chunk == j // self.chunk
        return seen | (j < self.prefix)


def both(a: PositionalMask, b: PositionalMask) -> PositionalMask | None:
    """The mask of positions where both are visible, or None where that is none."""
    if PositionalMask() in (a, b):
        return a if b == PositionalMask() else b
    banded = [p for p in (a, b) if p.left is not None or p.right is not None]
    if len({p.bottom_right for p in banded}) > 1 or (a.prefix != b.prefix and banded and (a.prefix or b.prefix)):
        return None
    if (a.prefix or b.prefix) and (a.chunk or b.chunk):
        return None
    if a.chunk and b.chunk and a.chunk != b.chunk:
        return None
    bounds = [min((x for x in pair if x is not None), default=None) for pair in ((a.left, b.left), (a.right, b.right))]
    from_the_end = any(p.bottom_right for p in banded)
    return PositionalMask(bounds[0], bounds[1], max(a.prefix, b.prefix), a.chunk or b.chunk, from_the_end)


def positional_mask_of(visible: Tensor) -> PositionalMask | None:
    """The band, prefix or chunks that a constant mask is, or None."""
    m, n = visible.shape
    if bool(visible.all()):
        return PositionalMask()
    i, j = torch.arange(m)[:, None], torch.arange(n)[None, :]
    band = _band(visible, i, j, 0)
    if band is not None:
        return band
    prefix = int(visible.all(0).long().cumprod(0).sum())
    if 0 < prefix < n:
        band = _band(visible, i, j, prefix)
        if band is not None:
            return band
    first = int(visible[:, 0].long().cumprod(0).sum())
    if 1 < first < m:
        return _first_equal(visible, [PositionalMask(chunk=first), PositionalMask(chunk=first, right=0)])
    return None


def _band(visible: Tensor, i: Tensor, j: Tensor, prefix: int) -> PositionalMask | None:
    beyond = visible & (j >= prefix)
    if not bool(beyond.any()):
        return None
    distance = (j - i).expand(visible.shape)[beyond]
    right, left = int(distance.max()), -int(distance.min())
    m, n = visible.shape
    bounds = (None if left >= m - 1 else left, None if right >= n - 1 else right)
    candidates = [(None, bounds[1]), (bounds[0], None), bounds]
    return _first_equal(visible, [PositionalMask(left, right, prefix) for left, right in candidates])


def _first_equal(visible: Tensor, candidates: list[PositionalMask]) -> PositionalMask | None:
    return next((p for p in candidates if torch.equal(visible, p.visible(*visible.shape))), None)


class Comparison:
    """Reads conditions over i and j, the positions of `rows` and `keys`, which must be one axis each.

    With `indexed`, a list, tensors indexed by positions are taken for positions: whoever asks finds them there, and has
    to see that their distances are the same.
    """

    def __init__(self, walk: Walk, rows: Dim, keys: Dim, indexed: list[Value] | None = None) -> None:
        self.walk, self.rows, self.keys, self.indexed = walk, leaves(rows), leaves(keys), indexed

    def read(self, x: Operand, want: bool) -> PositionalMask | None:
        """The keys visible where ``x == want``; None where that is not known to be a mask of positions."""
        if len(self.rows) != 1 or len(self.keys) != 1 or x.value.dtype != torch.bool:
            return None
        x, want = _bare(x, want)
        op, args = x.value.op, x.value.args
        truth = self._truth(x.value)
        if truth is not None:
            return PositionalMask() if truth == want else None
        if op in _ANDS | ORS and all(isinstance(v, Value) and v.dtype == torch.bool for v in args[:2]):
            sides = [x.side(v) for v in args[:2]]
            if (op in _ANDS) != want:
                return self._either(sides, want)
            return self._every([self.read(side, want) for side in sides])
        if op in (aten.eq.Tensor, aten.ne.Tensor) and (op is aten.eq.Tensor) == want:
            return self._chunks(x)
        bounds = self._bounds(x, want)
        return self._every([self._band(*bound) for bound in bounds]) if bounds else None

    def _every(self, masks: list[PositionalMask | None]) -> PositionalMask | None:
        found: PositionalMask | None = PositionalMask()
        for mask in masks:
            found = None if found is None or mask is None else both(found, mask)
        return found

    def _either(self, sides: list[Operand], want: bool) -> PositionalMask | None:
        """A band, or else a key of a prefix."""
        truths = [self._truth(side.value) for side in sides]
        if (not want) in truths:  # `or_masks` begins with nothing
            return self.read(sides[1 - truths.index(not want)], want)
        for x, y in (sides, reversed(sides)):
            bounds = self._bounds(*_bare(x, want))
            if bounds and len(bounds) == 1 and bounds[0][:2] == (0, 1):
                last, band = self._fixed(bounds[0][2]), self.read(y, want)
                if isinstance(last, int) and band is not None and not band.prefix and band.chunk is None:
                    return replace(band, prefix=last + 1) if last >= 0 else band
        return None

    def _chunks(self, x: Operand) -> PositionalMask | None:
        """``i // size == j // size``"""
        found: dict[tuple[int, int], Any] = {}
        for v in x.value.args[:2]:
            if not isinstance(v, Value):
                return None
            side = top(x.side(v), casts=False)
            op, args = side.value.op, side.value.args
            rounds = op is aten.div.Tensor_mode and side.value.kwargs.get("rounding_mode") == "floor"
            size = self._fixed(self._constant(args[1])) if rounds or op is aten.floor_divide.default else None
            inner = self._linear(side, args[0]) if isinstance(size, int) else None
            if inner is None or _number(inner[2]) != 0:
                return None
            found[inner[:2]] = size
        i, j = found.get((1, 0)), found.get((0, 1))
        return PositionalMask(chunk=i) if i is not None and i == j and i > 0 else None

    def _band(self, a: int, b: int, c: Any) -> PositionalMask | None:
        """``a * i + b * j <= c``: a bound of j - i or of i - j; with `bottom_right` where c has N - M in it."""
        if (a, b) not in ((-1, 1), (1, -1)):
            return None
        c = self._fixed(c)
        from_the_end = not isinstance(c, int)
        if from_the_end:
            c = _number(c - b * (self.keys[0].size - self.rows[0].size))
            if not isinstance(c, int):
                return None
        return PositionalMask(c if a == 1 else None, c if b == 1 else None, bottom_right=from_the_end)

    def _bounds(self, x: Operand, want: bool) -> list[_Linear]:
        """A comparison as inequalities ``a * i + b * j <= c`` that must hold; none if it is not understood."""
        if x.value.op not in _COMPARES:
            return []
        sign, equal = _COMPARES[x.value.op]
        if not want:
            sign, equal = -sign, not equal
        low, high = x.value.args[:2] if sign < 0 else x.value.args[1::-1]
        size = top(x.side(low), casts=False) if isinstance(low, Value) else None
        absolute = size is not None and size.value.op is aten.abs.default
        less = self._linear(size, size.value.args[0]) if size is not None and absolute else self._linear(x, low)
        more = self._linear(x, high)
        if less is None or more is None or (absolute and more[:2] != (0, 0)):
            return []
        both_signs = (less, _sum((0, 0, 0), less, -1)) if absolute else (less,)
        found = [_sum(one, more, -1) for one in both_signs]
        return [(a, b, -c - (0 if equal else 1)) for a, b, c in found]

    def _linear(self, x: Operand, given: Any) -> _Linear | None:
        """An integer operand of an operation as ``a * i + b * j + c``."""
        if not isinstance(given, Value):
            return (0, 0, given) if isinstance(given, (int, torch.SymInt)) and not isinstance(given, bool) else None
        if not isinstance(given.fake, Tensor):
            return None
        x = top(x.side(given), casts=False)
        op, args = x.value.op, x.value.args
        if x.value.dtype not in _INTEGERS:
            return None
        constant = self._constant(x.value)
        if constant is not None:
            return 0, 0, constant
        if op in (aten._to_copy.default, aten.detach.default):  # integers have no gradient
            return self._linear(x, args[0])
        if op in _ARANGES:
            return self._arange(x)
        if op is aten.index.Tensor and self.indexed is not None:
            return self._indexed(x, self.indexed)
        negates = op is aten.neg.default
        if not negates and (op not in SUMS or x.value.kwargs.get("alpha", 1) != 1):
            return None
        first, second = ((0, 0, 0) if negates else self._linear(x, args[0])), self._linear(x, args[0 if negates else 1])
        if first is None or second is None:
            return None
        return _sum(first, second, 1 if op is aten.add.Tensor else -1)

    def _indexed(self, x: Operand, indexed: list[Value]) -> _Linear | None:
        """``positions[b, i]`` as i."""
        source, indices = x.value.args[:2]
        if len(indices) != len(source.shape) or any(v is None for v in indices):
            return None
        indexed.append(x.value)
        return self._linear(x, indices[-1])

    def _arange(self, x: Operand) -> _Linear | None:
        given = x.value.args[: _ARANGES[x.value.op]]
        start = given[0] if len(given) > 1 else 0
        step = given[2] if len(given) > 2 else 1
        if len(x.axes) != 1 or x.axes[0].at is not None or step != 1 or not known(x.value.shape[0] == x.axes[0].size):
            return None
        if x.axes[0] is self.rows[0]:
            return 1, 0, start
        return (0, 1, start) if x.axes[0] is self.keys[0] else None

    def _fixed(self, x: Any) -> Any:
        """A number as an int. A symbolic one that is no length, such as a window, is fixed by that."""
        x = _number(x)
        lengths = [axis.size for axis in (*self.rows, *self.keys) if not isinstance(axis.size, int)]
        if not isinstance(x, torch.SymInt) or any(_symbols(x) & _symbols(size) for size in lengths):
            return x
        return int(x)

    def _truth(self, value: Value) -> bool | None:
        """What a condition that is the same everywhere says."""
        found = self._evaluated(value) if all(known(n == 1) for n in value.shape) else None
        return None if found is None else bool(found)

    def _constant(self, value: Any) -> int | torch.SymInt | None:
        if not isinstance(value, Value):
            return value if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) else None
        found = None if value.shape else self._evaluated(value)
        return None if found is None else int(found)

    def _evaluated(self, value: Value) -> Tensor | None:
        """A constant that no buffer is in."""
        found = self.walk.constants.evaluate(value)
        return None if self.walk.constants.buffers.get(value) else found


def _bare(x: Operand, want: bool) -> tuple[Operand, bool]:
    """What ``x == want`` says without views and negations."""
    x = top(x, casts=False)
    while x.value.op in NOTS and x.value.args[0].dtype == torch.bool:
        x, want = top(x.side(x.value.args[0]), casts=False), not want
    return x, want


def _sum(a: _Linear, b: _Linear, sign: int) -> _Linear:
    return a[0] + sign * b[0], a[1] + sign * b[1], a[2] + sign * b[2]


def _symbols(x: torch.SymInt) -> set[Any]:
    return set(x.node.expr.free_symbols)


def _number(x: Any) -> Any:
    """A symbolic number that is a constant, as an int."""
    if isinstance(x, torch.SymInt):
        found = x.node.maybe_as_int()
        return x if found is None else found
    return x
