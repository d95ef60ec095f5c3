"""Which axes of an attention are batch, heads, query heads of one key head, queries, keys and features."""

from __future__ import annotations

from dataclasses import dataclass

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, all_axes, free_axes, leaves, resolve
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Attention, Scores, Term
from fx_passes.canonicalise.views import peel


@dataclass
class AttentionDims:
    batch: Dim
    heads: Dim
    group: Dim  # query heads that share one key head
    rows: Dim
    keys: Dim
    features: Dim
    out: Dim  # value's features

    @property
    def query_heads(self) -> Dim:
        return (*self.heads, *self.group)


def peeled(operand: Operand) -> Operand:
    return Operand(*peel(operand.value, operand.layout))


def attention_dims(
    attention: Attention, term: Term, scores: Scores, value: Operand, query: Operand | None, key: Operand | None
) -> AttentionDims:
    """The roles for one term; operands are peeled.

    Rows are the axes of the query that key and value lack; of several, those that masks and biases tie to the keys.
    """
    keys_of = term.keys if term.extension is None else term.extension[0]
    logits = resolve(scores.whole.layout)
    mine = set(leaves(keys_of))
    keys = tuple(a for dim in logits for a in dim if a in mine)
    others = [a for a in free_axes(logits) if a not in mine]
    value_axes = free_axes(value.layout)
    shared = set(value_axes) | (set(all_axes(key.layout)) if key is not None else set())
    own = [a for a in others if a not in shared]
    rows = _rows(scores, logits, own, mine)
    common = [a for a in others if a in shared]
    out = tuple(a for a in value_axes if a not in mine and a not in set(others))
    features: Dim = ()
    if key is not None and query is not None:
        features = tuple(a for a in free_axes(key.layout) if a not in mine and a not in set(others))
        if set(features) - set(all_axes(query.layout)):
            raise FailedMatch("the key has an axis that the query lacks")
    if set(others) - set(all_axes(attention.layout)) - set(leaves(term.mixed)):
        raise FailedMatch("an axis of the scores is not in the result")
    if not mine <= set(value_axes):
        raise FailedMatch("value does not run over the keys")
    group = tuple(a for a in own if a not in rows)
    return AttentionDims(tuple(common[:-1]), tuple(common[-1:]), group, rows, keys, features, out)


def _rows(scores: Scores, logits: tuple[Dim, ...], own: list[Axis], keys: set[Axis]) -> Dim:
    if not own:
        return ()
    layouts = [b.layout for b in scores.biases] + [m.layout for m in scores.masks]
    tied: set[Axis] | None = None
    for layout in layouts:
        axes = set(all_axes(layout))
        if axes & keys and axes & set(own):
            tied = axes & set(own) if tied is None else tied & axes
    wanted = tied or set(own)
    last = [a for a in own if a in wanted][-1]
    dim = next(d for d in logits if last in d)
    return tuple(a for a in dim if a in wanted and a in own)
