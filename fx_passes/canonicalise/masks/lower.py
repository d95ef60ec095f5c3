"""Masks as the operator takes them: positions, documents, bool tensors, biases; and what that relies on.

Absorbed(conditions, biases, fills)        LoweredMask(positional, documents, keep, biases, fills)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.utils._pytree import tree_leaves

from fx_passes.canonicalise.axes import Dim, FailedMatch, Operand, leaves
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.forms import Bias, Mask, Term, Walk, arguments
from fx_passes.canonicalise.masks.absorb import Absorbed, absorb
from fx_passes.canonicalise.masks.classify import classify
from fx_passes.canonicalise.masks.conditions import KeepMask, every_row_sees, length, matrix, visible
from fx_passes.canonicalise.masks.positional import Comparison, PositionalMask, both, positional_mask_of
from fx_passes.find.calls import is_call
from fx_passes.find.relations import aligned, relation
from fx_passes.find.sizes import Sizes
from fx_passes.find.trace import Value

aten = torch.ops.aten
_LARGEST = 1 << 25  # elements of a mask that is looked at beyond its own size
_NEAR = 200  # operations


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
        found = [matrix(self.constants, seen, self.rows, self.keys, sizes) for seen in self.parts]
        if any(m is None for m in found) or (self.all_rows_see and not every_row_sees(found)):
            return False
        return torch.equal(visible(found), self.positional.visible(length(self.rows, sizes), length(self.keys, sizes)))


def lower_mask(walk: Walk, term: Term, rows: Dim, keys: Dim) -> LoweredMask:
    """The plan for a term's masks and biases.

    FailedMatch: it cannot be exact, or zeroed probabilities are no mask of the scores.
    """
    probes = _probes(walk, term, rows, keys)
    if probes:
        result, claim = _lowered(walk, term, rows, keys, probes[0])
        if claim is not None and all(claim.holds(sizes) for sizes in probes):
            walk.claims.append(claim)
            return result
    return _lowered(walk, term, rows, keys, None)[0]


def _lowered(walk: Walk, term: Term, rows: Dim, keys: Dim, sizes: Sizes | None) -> tuple[LoweredMask, MaskGuard | None]:
    """The lowered mask, and its guard if it is positional; masks over symbolic sizes are evaluated with `sizes`."""
    masks = classify(walk, term, keys, sizes)
    if masks is None:
        raise FailedMatch("probabilities are set to zero behind softmax at positions that the scores do not mask")
    result, claim = _lower(walk, absorb(walk, term, masks, rows, keys, sizes), rows, keys)
    if term.scores is not None and term.scores.causal:
        if result.biases or result.keep:
            raise FailedMatch("is_causal together with a mask")
        result.positional = PositionalMask(right=0)
    return result, claim


def _probes(walk: Walk, term: Term, rows: Dim, keys: Dim) -> list[Sizes]:
    """Sizes at which masks over symbolic positions are looked at; none where all are static, or some are unknown.

    First larger ones than any number in the masks: a window is not to be taken for causal only because the first batch
    was short. Then others at which M - N differs, and those of the first batch.
    """
    symbolic = [axis.size for axis in leaves((*rows, *keys)) if not isinstance(axis.size, int)]
    hints, mine = walk.context.symbols.hints, sorted({s for x in symbolic for s in x.node.expr.free_symbols}, key=str)
    if not symbolic or not hints.keys() >= set(mine):
        return []
    more = 1 + max(_numbers([x.value for x in term.scores.added] if term.scores is not None else []), default=0)
    probes = [hints | {s: hints[s] + more + skew * i for i, s in enumerate(mine)} for skew in (0, 5)]
    affordable = length(rows, probes[0]) * length(keys, probes[0]) <= _LARGEST
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


def _lower(walk: Walk, masks: Absorbed, rows: Dim, keys: Dim) -> tuple[LoweredMask, MaskGuard | None]:
    """Conditions as a positional mask, documents, and bool tensors for the rest."""
    result = LoweredMask(biases=masks.biases, fills=masks.fills, fully_masked=masks.fully_masked)
    rest = [c for c in masks.conditions if not _joins(result, c.positional)]
    claim = None
    by_value = positional_mask_of(visible(c.matrix for c in rest)) if rest else None
    if by_value is not None and _joins(result, by_value):
        placed = tuple(c.seen for c in rest if c.matrix is not None)
        claim = MaskGuard(walk.constants, placed, rows, keys, by_value, masks.all_rows_see)
        rest = [c for c in rest if c.matrix is None]
    read = [(c.seen, None if masks.fully_masked else _documents(c.seen, rows, keys)) for c in rest]
    result.documents = [documents for _, documents in read if documents is not None]
    for seen in [seen for seen, documents in read if documents is None]:
        if not _joins(result, _within_documents(walk, seen, rows, keys, result.documents)):
            result.keep.append(seen)
    return result, claim


def _joins(result: LoweredMask, positional: PositionalMask | None) -> bool:
    """Puts a positional mask into the one that there is, if that is possible."""
    together = None if positional is None else both(result.positional, positional)
    result.positional = together or result.positional
    return together is not None


def _within_documents(
    walk: Walk, seen: KeepMask, rows: Dim, keys: Dim, documents: list[Documents]
) -> PositionalMask | None:
    """A band of positions that restart with each document: within one, it is a band of positions."""
    if seen.value.home is None or not is_call(seen.value.home):
        return None
    indexed: list[Value] = []
    positional = Comparison(walk, rows, keys, indexed).read(seen, seen.keep)
    sources = {x.args[0] for x in indexed}
    if positional is None or len(sources) != 1 or positional.prefix or positional.chunk or positional.bottom_right:
        return None
    (positions,) = sources
    for one in documents:
        sides = [one.query.value, one.key.value]
        if any(x.op is not aten.index.Tensor for x in sides) or sides[0].args[0] is not sides[1].args[0]:
            continue
        ids: Value = sides[0].args[0]
        same_entries = len({tuple(x.args[1][:-1]) for x in (*indexed, *sides)}) == 1
        nodes = tuple(x.node for x in (positions, ids) if x.node is not None and x.version is None)
        found = relation(walk.context, nodes, aligned) if same_entries and len(nodes) == 2 else None
        if found is not None:
            walk.relations.append(found)
            return positional
    return None


def _documents(seen: KeepMask, rows: Dim, keys: Dim) -> Documents | None:
    """``a == b`` where the one is a number for each row and the other one for each key."""
    if seen.value.op is not (aten.eq.Tensor if seen.keep else aten.ne.Tensor) or seen.added:
        return None
    sides = [seen.side(x) for x in seen.value.args[:2] if isinstance(x, Value)]
    if len(sides) != 2 or any(x.value.dtype.is_floating_point or x.value.dtype.is_complex for x in sides):
        return None
    for query, key in (sides, reversed(sides)):
        if query.over(rows) and key.over(keys) and not query.over(keys) and not key.over(rows):
            return Documents(query, key)
    return None
