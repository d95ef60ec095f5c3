"""What masks and biases mean: bands, prefixes and chunks of places; masks of keys; and what stays a tensor.

Setting a score to -1e9 is not quite masking it: a row in which every score is -1e9 has equal weights. So a mask with a
finite fill becomes a true one only where no row can lose all its keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import Dim, Layout, all_axes, broadcast, leaves, resolve
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import BIG, Bias, Mask, Scores, Walk
from fx_passes.canonicalise.views import before, is_cast, is_view
from fx_passes.canonicalise.weights import FILLS, choices
from fx_passes.find.trace import Value

aten = torch.ops.aten
_ANDS = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor}
_ORS = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}
_NOTS = {aten.bitwise_not.default, aten.logical_not.default}


@dataclass
class Places:
    """A mask of places: a key may lie `left` before and `right` after its query; `prefix` keys are always seen."""

    left: int | None = None
    right: int | None = None
    prefix: int = 0
    chunk: int | None = None

    @property
    def kind(self) -> str:
        parts = ["causal" if self.right == 0 else f"up to {self.right} ahead"] if self.right is not None else []
        parts += [] if self.left is None else [f"window {self.left + 1}"]
        parts += [] if not self.prefix else [f"prefix {self.prefix}"]
        parts += [] if self.chunk is None else [f"chunk {self.chunk}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Seen:
    """A key is visible where ``(operand != 0) == keep``, or, with `additive`, where the operand is no mask value."""

    operand: Operand
    keep: bool
    additive: bool = False


@dataclass
class Plan:
    """What the operator gets: places, bool masks, biases, and fills that are added where a mask has a finite value."""

    places: Places = field(default_factory=Places)
    keep: list[Seen] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    fills: list[Mask] = field(default_factory=list)

    @property
    def kind(self) -> str:
        parts = [self.places.kind] if self.places.kind else []
        parts += ["mask"] if self.keep or self.fills else []
        parts += ["bias"] if self.biases else []
        return " + ".join(parts) or "none"


@dataclass
class _Part:
    seen: Seen
    matrix: Tensor | None  # visible [M, N], if places and constants alone decide it


def plan(walk: Walk, scores: Scores, weight_masks: list[Mask], rows: Dim, keys: Dim) -> Plan | None:
    """The plan for a term's masks and biases; None where zeroed weights are no mask of the scores."""
    result = Plan()
    masks = list(scores.masks)
    for bias in scores.biases:
        mask = _as_mask(walk, bias)
        if mask is None:
            result.biases.append(bias)
        else:
            masks.append(mask)
    hard: list[Mask] = []
    soft: list[Mask] = []
    for mask in masks:
        zeroed = any(_same_condition(mask, other) for other in weight_masks)
        (hard if zeroed or math.isinf(mask.fill) else soft).append(mask)
    for other in weight_masks:
        if math.isinf(other.fill):
            hard.append(other)
        elif not any(_same_condition(mask, other) for mask in masks):
            return None
    _decide(walk, result, hard, soft, rows, keys)
    return result


def _decide(walk: Walk, result: Plan, hard: list[Mask], soft: list[Mask], rows: Dim, keys: Dim) -> None:
    hard_parts = [p for m in hard for p in _parts(walk, m, rows, keys)]
    soft_parts = [[*_parts(walk, m, rows, keys)] for m in soft]
    constant = all(p.matrix is not None for p in (*hard_parts, *(p for parts in soft_parts for p in parts)))
    if soft and constant:
        both = _all([*hard_parts, *(p for parts in soft_parts for p in parts)])
        if bool(both.any(-1).all()):
            hard_parts += [p for parts in soft_parts for p in parts]
            soft = []
    for mask in soft:
        if mask.origin is not None:
            result.biases.append(mask.origin)
        else:
            result.fills.append(mask)
    places = _places(_all([p for p in hard_parts if p.matrix is not None])) if hard_parts else None
    if places is not None:
        result.places = places
        hard_parts = [p for p in hard_parts if p.matrix is None]
    result.keep += [p.seen for p in hard_parts]


def _same_condition(a: Mask, b: Mask) -> bool:
    return a.keep == b.keep and a.value is b.value and resolve(a.layout) == resolve(b.layout)


def _as_mask(walk: Walk, bias: Bias) -> Mask | None:
    """A bias that is nothing but zero and mask values."""
    if bias.factors or bias.value.dtype == torch.bool or not bias.value.dtype.is_floating_point:
        return None
    constant = walk.constant(bias.value)
    if constant is not None:
        values = constant * bias.scale
        visible, masked = values == 0, values <= BIG
        if bool((visible | masked).all()):
            fill = -math.inf if bool(torch.isinf(values[masked]).all()) else float(values[masked].max())
            # `keep` False: visible where the tensor is 0, which its scale leaves 0; True: where it is no mask value.
            return Mask(bias.value, bias.layout, bias.scale == 1.0, fill, origin=bias)
        return None
    if bias.scale != 1.0:
        return None
    return _filled_zeros(walk, bias)


def _filled_zeros(walk: Walk, bias: Bias) -> Mask | None:
    """``where(condition, 0, fill)`` in one of its forms."""
    value, layout = bias.value, bias.layout
    while is_view(value) or is_cast(value):
        layout = before(value, layout) if is_view(value) else layout
        value = value.args[0]
    if value.op not in FILLS:
        return None
    for kept, fill, condition, keep in choices(walk, value):
        zero = walk.constant(kept)
        if fill <= BIG and zero is not None and not bool(zero.any()):
            where = broadcast(layout, condition.shape)
            return Mask(condition, where, keep, fill, origin=bias)
    return None


def _parts(walk: Walk, mask: Mask, rows: Dim, keys: Dim) -> list[_Part]:
    if mask.value.dtype.is_floating_point and mask.origin is not None and mask.keep:
        constant = walk.constant(mask.value)
        matrix = None if constant is None else _matrix(constant > BIG, mask.layout, rows, keys)
        return [_Part(Seen(Operand(mask.value, mask.layout), True, additive=True), matrix)]
    found = []
    for operand, keep in conjunction(walk, mask.value, mask.layout, mask.keep):
        constant = walk.constant(operand.value)
        matrix = None
        if constant is not None:
            matrix = _matrix((constant != 0) == keep, operand.layout, rows, keys)
        found.append(_Part(Seen(operand, keep), matrix))
    return found


def conjunction(walk: Walk, value: Value, layout: Layout, want: bool) -> list[tuple[Operand, bool]]:
    """``value == want`` as a conjunction of simpler conditions of that kind."""
    if is_view(value):
        return conjunction(walk, value.args[0], before(value, layout), want)
    if value.op is aten._to_copy.default and isinstance(value.args[0], Value):
        if value.dtype == torch.bool or value.args[0].dtype == torch.bool:
            return conjunction(walk, value.args[0], layout, want)
    elif value.op in _NOTS and value.args[0].dtype == torch.bool:
        return conjunction(walk, value.args[0], layout, not want)
    elif value.op in (aten.eq.Scalar, aten.ne.Scalar) and value.args[1] == 0:
        return conjunction(walk, value.args[0], layout, want if value.op is aten.ne.Scalar else not want)
    elif value.op in (_ANDS if want else _ORS) and value.dtype == torch.bool:
        both = [v for v in value.args[:2] if isinstance(v, Value) and v.dtype == torch.bool]
        if len(both) == 2:
            return [x for v in both for x in conjunction(walk, v, broadcast(layout, v.shape), want)]
    return [(Operand(value, layout), want)]


def _matrix(visible: Tensor, layout: Layout, rows: Dim, keys: Dim) -> Tensor | None:
    """A mask as bool [M, N], or None if it differs along other axes than rows and keys."""
    axes = [*leaves(rows), *leaves(keys)]
    mine = list(all_axes(layout))
    if any(not isinstance(axis.size, int) for axis in (*axes, *mine)):
        return None
    others = [axis for axis in mine if axis not in axes]
    wanted = [*others, *(axis for axis in axes if axis in mine)]
    flat = visible.reshape([axis.size for axis in mine]).permute([mine.index(axis) for axis in wanted])
    flat = flat.reshape([math.prod(axis.size for axis in others), *flat.shape[len(others) :]])
    if bool((flat != flat[:1]).any()):
        return None
    shape = [axis.size if axis in mine else 1 for axis in axes]
    return flat[0].reshape(shape).expand([axis.size for axis in axes]).reshape(_length(rows), _length(keys))


def _length(axes: Dim) -> int:
    return math.prod(axis.size for axis in leaves(axes))


def _all(parts: list[_Part]) -> Tensor:
    matrices = [p.matrix for p in parts if p.matrix is not None]
    if not matrices:
        return torch.ones(1, 1, dtype=torch.bool)
    result = matrices[0]
    for m in matrices[1:]:
        result = result & m
    return result


def _places(visible: Tensor) -> Places | None:
    """The band, prefix or chunks that a constant mask is, or None."""
    m, n = visible.shape
    if bool(visible.all()):
        return Places()
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
        block = torch.equal(visible, i // first == j // first)
        if block or torch.equal(visible, (i // first == j // first) & (j <= i)):
            return Places(chunk=first, right=None if block else 0)
    return None


def _band(visible: Tensor, i: Tensor, j: Tensor, prefix: int) -> Places | None:
    beyond = visible & (j >= prefix)
    if not bool(beyond.any()):
        return None
    distance = (j - i).expand(visible.shape)[beyond]
    right, left = int(distance.max()), -int(distance.min())
    m, n = visible.shape
    bounds = (None if left >= m - 1 else left, None if right >= n - 1 else right)
    for places in (Places(None, bounds[1], prefix), Places(bounds[0], None, prefix), Places(*bounds, prefix)):
        seen = (j - i <= (n if places.right is None else places.right)) & (
            i - j <= (m if places.left is None else places.left)
        )
        if torch.equal(visible, (seen | (j < prefix)).expand(visible.shape)):
            return places
    return None
