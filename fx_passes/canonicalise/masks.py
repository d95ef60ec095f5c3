"""What masks and biases mean: bands, prefixes and chunks of positions; masks of keys; and what stays a tensor.

Setting a score to -1e9 is not quite masking it: a row in which every score is -1e9 has equal probs. So a mask with a
finite fill becomes a true one only where no row can lose all its keys, or where such rows can be computed apart
(`LoweredMask.fully_masked`, see `fx_passes.ops.fully_masked_rows`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fx_passes.canonicalise.affine import Comparison
from fx_passes.canonicalise.axes import Dim, FailedMatch, Layout, all_axes, broadcast, leaves, resolve
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import BIG, Bias, Mask, Scores, Term, Walk, arguments
from fx_passes.canonicalise.operators import ANDS, FILLS, NOTS, ORS
from fx_passes.canonicalise.positional_mask import PositionalMask, both, positional_mask_of
from fx_passes.canonicalise.readings import choices
from fx_passes.canonicalise.views import before, is_cast, is_view
from fx_passes.find.calls import is_call
from fx_passes.find.relations import aligned, relation
from fx_passes.find.sizes import Sizes, number
from fx_passes.find.trace import Value

aten = torch.ops.aten
SWAMPS = -1e30  # added to a score, a value at or below it leaves nothing of the score
_LARGEST = 1 << 25  # elements of a mask that is looked at beyond its own size
_NEAR = 200  # operations


@dataclass(frozen=True)
class KeepMask:
    """A key is visible where ``(operand != 0) == keep``; `added` is not 0 where the operand is 0 or a mask value."""

    operand: Operand
    keep: bool
    added: float = 0.0


@dataclass(frozen=True)
class Documents:
    """Numbers over rows and over keys: a query sees keys of its own number only."""

    query: Operand
    key: Operand


@dataclass
class LoweredMask:
    """What the operator gets: a positional mask, bool masks, biases, and fills added where a mask has a finite value.

    `fully_masked`: "", or what rows that see no key get: equal probs, with scores that are "replaced" (a constant) or
    "swamped" (a huge number was added: equal, too, but with a gradient).
    """

    positional: PositionalMask = field(default_factory=PositionalMask)
    keep: list[KeepMask] = field(default_factory=list)
    documents: list[Documents] = field(default_factory=list)
    biases: list[Bias] = field(default_factory=list)
    fills: list[Mask] = field(default_factory=list)
    fully_masked: str = ""

    @property
    def kind(self) -> str:
        parts = [self.positional.kind] if self.positional.kind else []
        parts += ["documents"] if self.documents else []
        parts += ["mask"] if self.keep or self.fills else []
        parts += ["bias"] if self.biases else []
        return " + ".join(parts) or "none"


@dataclass
class _Part:
    seen: KeepMask
    matrix: Tensor | None  # visible [M, N], if positions and constants alone decide it
    positional: PositionalMask | None = None  # the same, if its form alone tells


@dataclass(frozen=True)
class MaskGuard:
    """What the plan of a mask over symbolic sizes relies on, to be checked at the sizes of each call."""

    constants: Constants
    parts: tuple[KeepMask, ...]
    rows: Dim
    keys: Dim
    positional: PositionalMask
    all_rows_see: bool  # every query sees a key

    def holds(self, sizes: Sizes) -> bool:
        parts = [_Part(seen, _matrix(self.constants, seen, self.rows, self.keys, sizes)) for seen in self.parts]
        if any(p.matrix is None for p in parts) or (self.all_rows_see and not _none_fully_masked(parts)):
            return False
        return torch.equal(_all(parts), self.positional.visible(_length(self.rows, sizes), _length(self.keys, sizes)))


def lower_mask(walk: Walk, scores: Scores, term: Term, rows: Dim, keys: Dim) -> LoweredMask | None:
    """The plan for a term's masks and biases; None where zeroed probabilities are no mask of the scores."""
    probes = _probes(walk, scores, rows, keys)
    if probes:
        result, claim = _lower_mask(walk, scores, term, rows, keys, probes[0])
        if claim is not None and all(claim.holds(sizes) for sizes in probes):
            walk.claims.append(claim)
            return result
    return _lower_mask(walk, scores, term, rows, keys, None)[0]


def _probes(walk: Walk, scores: Scores, rows: Dim, keys: Dim) -> list[Sizes]:
    """Sizes at which masks over symbolic positions are looked at; none where all are static, or some are unknown.

    First larger ones than any number in the masks: a window is not to be taken for causal only because the first batch
    was short. Then others at which M - N differs, and those of the first batch.
    """
    symbolic = [axis.size for axis in leaves((*rows, *keys)) if not isinstance(axis.size, int)]
    hints, mine = walk.context.symbols.hints, sorted({s for x in symbolic for s in x.node.expr.free_symbols}, key=str)
    if not symbolic or not hints.keys() >= set(mine):
        return []
    more = 1 + max(_numbers([m.value for m in scores.masks] + [b.value for b in scores.biases]), default=0)
    probes = [hints | {s: hints[s] + more + skew * i for i, s in enumerate(mine)} for skew in (0, 5)]
    affordable = _length(rows, probes[0]) * _length(keys, probes[0]) <= _LARGEST
    return [*probes, hints] if affordable else []


def _numbers(values: list[Value]) -> list[int]:
    """Integers in the operations that values come from, as far as they are near."""
    found: list[int] = []
    seen: set[Value] = set()
    while values and len(seen) < _NEAR:
        value = values.pop(0)
        if value not in seen:
            seen.add(value)
            found += [x for x in tree_leaves((value.args, value.kwargs)) if type(x) is int and 0 < x < _LARGEST]
            values = values + list(arguments(value))
    return found


def _lower_mask(
    walk: Walk, scores: Scores, term: Term, rows: Dim, keys: Dim, sizes: Sizes | None
) -> tuple[LoweredMask | None, MaskGuard | None]:
    """The lowered mask, and its guard if it is positional; masks over symbolic sizes are evaluated with `sizes`."""
    masks = _classify(walk, scores, term, keys, sizes)
    if masks is None:
        return None, None
    return _lower(walk, _absorb(walk, scores, term, masks, rows, keys, sizes), rows, keys)


@dataclass(frozen=True)
class _Classified:
    """What is masked: `hard` masks hide keys, `soft` ones have a finite fill; `biases` are no masks."""

    hard: list[Mask]
    soft: list[Mask]
    biases: list[Bias]


def _classify(walk: Walk, scores: Scores, term: Term, keys: Dim, sizes: Sizes | None) -> _Classified | None:
    """Which masks hide keys. None where probabilities are zeroed at positions that the scores do not mask."""
    read = [(bias, _as_mask(walk, bias, sizes)) for bias in scores.biases]
    biases = [bias for bias, mask in read if mask is None]
    masks = [*scores.masks, *(mask for _, mask in read if mask is not None)]
    if not all(math.isinf(m.fill) or any(_same_condition(mask, m) for mask in masks) for m in term.masks):
        return None
    outlived = _outlived_by_sink(walk, scores, biases, keys)
    hides = [outlived or math.isinf(m.fill) or any(_same_condition(m, other) for other in term.masks) for m in masks]
    hard = [m for m, hidden in zip(masks, hides, strict=True) if hidden]
    soft = [m for m, hidden in zip(masks, hides, strict=True) if not hidden]
    return _Classified([*hard, *(m for m in term.masks if math.isinf(m.fill))], soft, biases)


@dataclass(frozen=True)
class _Absorbed:
    """Conditions that hide keys, finite masks among them where that is exact; the other ones are added to the scores.

    `fully_masked` is that of `LoweredMask`, `all_rows_see` says that conditions are exact since every row sees a key.
    """

    conditions: list[_Part]
    biases: list[Bias]
    fills: list[Mask]
    fully_masked: str = ""
    all_rows_see: bool = False


def _absorb(
    walk: Walk, scores: Scores, term: Term, masks: _Classified, rows: Dim, keys: Dim, sizes: Sizes | None
) -> _Absorbed:
    """Finite masks as true ones where no row can lose all its keys by them, or where such rows are computed apart."""
    hard = [p for m in masks.hard for p in _parts(walk, m, rows, keys, sizes, by_form=True)]
    soft = [(m, _parts(walk, m, rows, keys, sizes)) for m in masks.soft]
    for i in _hidden_by_others([parts for _, parts in soft]) if not sizes else ():
        hard += soft.pop(i)[1]
    every = [*hard, *(p for _, parts in soft for p in parts)]
    if not soft or _none_fully_masked(every):
        return _Absorbed(every, masks.biases, [], all_rows_see=bool(soft))
    if len(soft) == 1 and not hard and _lost_apart(*soft[0], scores, masks.biases, term):
        return _Absorbed(every, masks.biases, [], "replaced" if soft[0][0].origin is None else "swamped")
    fills = [m for m, _ in soft if m.origin is None]
    if fills and (len(soft) > 1 or (scores.query is not None and scores.biases)):
        raise FailedMatch("masked scores may be all that a row has, and get another mask or a bias")
    return _Absorbed(hard, [*masks.biases, *(m.origin for m, _ in soft if m.origin is not None)], fills)


def _lower(walk: Walk, masks: _Absorbed, rows: Dim, keys: Dim) -> tuple[LoweredMask, MaskGuard | None]:
    """Conditions as a positional mask, documents, and bool tensors for the rest."""
    formed, conditions = _by_form(masks.conditions)
    result = LoweredMask(formed, biases=masks.biases, fills=masks.fills, fully_masked=masks.fully_masked)
    positional = positional_mask_of(_all(conditions)) if conditions else None
    together = None if positional is None else both(formed, positional)
    claim = None
    if positional is not None and together is not None:
        result.positional = together
        placed = tuple(p.seen for p in conditions if p.matrix is not None)
        claim = MaskGuard(walk.constants, placed, rows, keys, positional, masks.all_rows_see)
        conditions = [p for p in conditions if p.matrix is None]
    read = [(p.seen, None if masks.fully_masked else _documents(p.seen, rows, keys)) for p in conditions]
    result.documents = [documents for _, documents in read if documents is not None]
    for seen in [seen for seen, documents in read if documents is None]:
        positional = _by_positions(walk, seen, rows, keys, result.documents)
        together = None if positional is None else both(result.positional, positional)
        if together is None:
            result.keep.append(seen)
        else:
            result.positional = together
    return result, claim


def _by_positions(
    walk: Walk, seen: KeepMask, rows: Dim, keys: Dim, documents: list[Documents]
) -> PositionalMask | None:
    """A band of positions that restart with each document: within one, it is a band of positions."""
    value, layout = seen.operand.value, seen.operand.layout
    if value.home is None or not is_call(value.home):
        return None
    comparison = Comparison(walk, rows, keys)
    comparison.positions = []
    positional = comparison.positional(value, layout, seen.keep)
    sources = {x.args[0] for x in comparison.positions}
    if positional is None or len(sources) != 1 or positional.prefix or positional.chunk or positional.bottom_right:
        return None
    (source,) = sources
    for one in documents:
        ids = [x.value for x in (one.query, one.key)]
        if any(x.op is not aten.index.Tensor or x.args[0] is not ids[0].args[0] for x in ids):
            continue
        entries = {tuple(x.args[1][:-1]) for x in (*comparison.positions, *ids)}
        nodes = source.node, ids[0].args[0].node
        if len(entries) != 1 or any(node is None for node in nodes) or any(x.version for x in (source, ids[0].args[0])):
            continue
        found = relation(walk.context, nodes, aligned)
        if found is not None:
            walk.relations.append(found)
            return positional
    return None


def _by_form(parts: list[_Part]) -> tuple[PositionalMask, list[_Part]]:
    """What parts whose form tells their positions are together, and the parts that are not in it."""
    found, rest = PositionalMask(), []
    for part in parts:
        more = None if part.positional is None else both(found, part.positional)
        if more is None:
            rest.append(part)
        else:
            found = more
    return found, rest


def _documents(seen: KeepMask, rows: Dim, keys: Dim) -> Documents | None:
    """``a == b`` where the one is a number for each row and the other one for each key."""
    value, layout = seen.operand.value, seen.operand.layout
    if value.op is not (aten.eq.Tensor if seen.keep else aten.ne.Tensor) or seen.added:
        return None
    sides = [Operand(x, broadcast(layout, x.shape)) for x in value.args[:2] if isinstance(x, Value)]
    if len(sides) != 2 or any(x.value.dtype.is_floating_point or x.value.dtype.is_complex for x in sides):
        return None
    for query, key in (sides, reversed(sides)):
        a, b = set(all_axes(query.layout)), set(all_axes(key.layout))
        if a & set(leaves(rows)) and b & set(leaves(keys)) and not a & set(leaves(keys)) and not b & set(leaves(rows)):
            return Documents(query, key)
    return None


def wants_gradient(bias: Bias) -> bool:
    node = bias.value.node or bias.value.home
    fake = None if node is None else node.meta.get("example_value")
    return not isinstance(fake, Tensor) or fake.requires_grad


def _outlived_by_sink(walk: Walk, scores: Scores, biases: list[Bias], keys: Dim) -> bool:
    """Whether a sink takes all the weight of a row that sees no key, so that any mask value masks."""
    if scores.sink is None or scores.wide is not None:
        return False
    if any(not set(leaves(keys)) & set(all_axes(b.layout)) for b in biases):
        return False  # the row's own maximum was subtracted
    if scores.sink.operand is None:
        return scores.sink.number > BIG / 10
    constant = walk.constant(scores.sink.operand.value)
    return constant is None or bool((constant > BIG / 10).all())


def _hidden_by_others(masks: list[list[_Part]]) -> list[int]:
    """Constant masks, last first, that take no row all its keys and hide nothing that another one does not hide.

    What such a mask hides is hidden twice, and has no weight even in a row that the other leaves nothing.
    """
    found = []
    for i, parts in reversed([*enumerate(masks)]):
        others = [_all(other) for j, other in enumerate(masks) if j != i and j not in found]
        if _none_fully_masked(parts) and any(not bool((other & ~_all(parts)).any()) for other in others):
            found.append(i)
    return found


def _none_fully_masked(parts: list[_Part]) -> bool:
    """Whether constants prove that every row sees a key."""
    return all(p.matrix is not None for p in parts) and bool(_all(parts).any(-1).all())


def _lost_apart(mask: Mask, parts: list[_Part], scores: Scores, biases: list[Bias], term: Term) -> bool:
    """Whether rows that a finite mask leaves no key have equal probabilities, so that they can be computed apart."""
    if (
        scores.query is None
        or scores.sink is not None
        or term.dropout
        or any(p.seen.added and p.matrix is None for p in parts)
    ):
        return False
    if mask.origin is None:
        return mask.over == len(scores.biases) or (mask.fill <= SWAMPS and not any(map(wants_gradient, biases)))
    return mask.fill <= SWAMPS and not scores.softcap and not any(map(wants_gradient, biases))


def _same_condition(a: Mask, b: Mask) -> bool:
    return a.keep == b.keep and a.value is b.value and resolve(a.layout) == resolve(b.layout)


def _as_mask(walk: Walk, bias: Bias, sizes: Sizes | None) -> Mask | None:
    """A bias that is nothing but zero and mask values."""
    if bias.factors or bias.value.dtype == torch.bool or not bias.value.dtype.is_floating_point:
        return None
    constant = walk.constant(bias.value)
    if constant is None and sizes is not None and bias.scale == 1.0:
        constant = walk.constants.evaluate(bias.value, sizes)
    if constant is not None:
        values = constant * bias.scale
        visible, masked = constant == 0, values <= BIG
        if bool((visible | masked).all()):
            fill = -math.inf if bool(torch.isinf(values[masked]).all()) else float(values[masked].max())
            return Mask(bias.value, bias.layout, True, fill, origin=bias)
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


def _parts(walk: Walk, mask: Mask, rows: Dim, keys: Dim, sizes: Sizes | None, by_form: bool = False) -> list[_Part]:
    if mask.value.dtype.is_floating_point and mask.origin is not None:
        found = [KeepMask(Operand(mask.value, mask.layout), False, mask.fill)]
    else:
        found = [KeepMask(*x) for x in conjunction(walk, mask.value, mask.layout, mask.keep)]
    parts = []
    for seen in found:
        home = seen.operand.value.home
        if by_form and home is not None and is_call(home):
            positional = Comparison(walk, rows, keys).positional(seen.operand.value, seen.operand.layout, seen.keep)
            axes = set(all_axes(seen.operand.layout))
            if positional is not None or not axes & set(leaves(rows)) or not axes & set(leaves(keys)):
                parts.append(_Part(seen, None, positional))
                continue
        parts.append(_Part(seen, _matrix(walk.constants, seen, rows, keys, sizes)))
        if parts[-1].matrix is not None:
            walk.buffers |= walk.constants.buffers.get(seen.operand.value, frozenset())
    return parts


def conjunction(walk: Walk, value: Value, layout: Layout, want: bool) -> list[tuple[Operand, bool]]:
    """``value == want`` as a conjunction of simpler conditions of that kind."""
    if is_view(value):
        return conjunction(walk, value.args[0], before(value, layout), want)
    if value.op is aten._to_copy.default and isinstance(value.args[0], Value):
        if value.dtype == torch.bool or value.args[0].dtype == torch.bool:
            return conjunction(walk, value.args[0], layout, want)
    elif value.op in NOTS and value.args[0].dtype == torch.bool:
        return conjunction(walk, value.args[0], layout, not want)
    elif value.op in (aten.eq.Scalar, aten.ne.Scalar) and value.args[1] == 0:
        return conjunction(walk, value.args[0], layout, want if value.op is aten.ne.Scalar else not want)
    elif value.op in (ANDS if want else ORS) and value.dtype == torch.bool:
        both = [v for v in value.args[:2] if isinstance(v, Value) and v.dtype == torch.bool]
        if len(both) == 2:
            return [x for v in both for x in conjunction(walk, v, broadcast(layout, v.shape), want)]
    return [(Operand(value, layout), want)]


def _matrix(constants: Constants, seen: KeepMask, rows: Dim, keys: Dim, sizes: Sizes | None) -> Tensor | None:
    """A mask as bool [M, N], or None if inputs decide it or if it differs along other axes than rows and keys."""
    constant = constants.evaluate(seen.operand.value, sizes)
    axes, mine = [*leaves(rows), *leaves(keys)], list(all_axes(seen.operand.layout))
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
    return expanded.reshape(_length(rows, sizes), _length(keys, sizes))


def _length(axes: Dim, sizes: Sizes | None) -> int:
    return math.prod(number(axis.size, sizes) for axis in leaves(axes))


def _all(parts: list[_Part]) -> Tensor:
    matrices = [p.matrix for p in parts if p.matrix is not None]
    if not matrices:
        return torch.ones(1, 1, dtype=torch.bool)
    result = matrices[0]
    for m in matrices[1:]:
        result = result & m
    return result
