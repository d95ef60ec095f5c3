"""Which axes of an attention are batch, heads, query heads of one key head, queries, keys and features.

scores [b, h, m, n], key [b, h // 2, n, d]      batch (B), heads (H1), group (H2), rows (M), keys (N), features (D)
"""

from __future__ import annotations

from dataclasses import dataclass

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, Operand, free_axes, leaves, resolve
from fx_passes.canonicalise.forms import Attention, Product, Term


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


def attention_dims(attention: Attention, term: Term, product: Product | None, value: Operand) -> AttentionDims:
    """The roles for one term; operands are peeled.

    Rows are the axes of the query that key and value lack; of several, those that masks and biases tie to the keys.
    """
    logits = resolve(term.softmax.source.layout)
    mine = set(leaves(term.keys))
    keys = tuple(a for dim in logits for a in dim if a in mine)
    others = [a for a in free_axes(logits) if a not in mine]
    shared = set(free_axes(value.layout)) | (set() if product is None else set(product.key.axes))
    own = [a for a in others if a not in shared]
    rows = _rows(term, logits, own, mine)
    common = [a for a in others if a in shared]
    features, out = (
        () if x is None else tuple(a for a in free_axes(x.layout) if a not in mine and a not in others)
        for x in (None if product is None else product.key, value)
    )
    if product is not None and set(features) - set(product.query.axes):
        raise FailedMatch("the key has an axis that the query lacks")
    if set(others) - set(attention.out.axes) - set(leaves(term.mixed)):
        raise FailedMatch("an axis of the scores is not in the result")
    if not mine <= set(free_axes(value.layout)):
        raise FailedMatch("value does not run over the keys")
    group = tuple(a for a in own if a not in rows)
    return AttentionDims(tuple(common[:-1]), tuple(common[-1:]), group, rows, keys, features, out)


def _rows(term: Term, logits: Layout, own: list[Axis], keys: set[Axis]) -> Dim:
    if not own:
        return ()
    tied: set[Axis] | None = None
    for x in (*term.scores.biases, *term.scores.masks) if term.scores is not None else ():
        axes = set(x.axes)
        if axes & keys and axes & set(own):
            tied = axes & set(own) if tied is None else tied & axes
    wanted = tied or set(own)
    last = [a for a in own if a in wanted][-1]
    dim = next(d for d in logits if last in d)
    return tuple(a for a in dim if a in wanted and a in own)
