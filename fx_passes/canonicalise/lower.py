"""Decides everything about an attention that depends on the model: roles of axes, masks, where factors go, the tier.

Term(Scores(Product(q, k), factors), factors)       attend(q * on_query, k * on_key, v * on_value) * on_out
Term(scores=None)                                   attend_logits(softmax.source, v * on_value) * on_out
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fx_passes.canonicalise import sinks
from fx_passes.canonicalise.attention_dims import AttentionDims, attention_dims
from fx_passes.canonicalise.axes import Dim, FailedMatch, Operand, free_axes, leaves, product
from fx_passes.canonicalise.forms import BIG, Attention, Bias, Factor, Product, Term, Walk, level
from fx_passes.canonicalise.masks.lower import LoweredMask, lower_mask
from fx_passes.canonicalise.views import peeled
from fx_passes.find.context import Level

_WIDEST = 256  # values that the kernels take


@dataclass
class LoweredTerm:
    """A term with everything decided: nothing can fail that depends on the model any more.

    `product` is None in tier 2, where the logits are taken as a whole.
    """

    term: Term
    dims: AttentionDims
    mask: LoweredMask
    product: Product | None
    value: Operand
    on_query: list[Factor]
    on_key: list[Factor]
    on_value: list[Factor]
    on_out: list[Factor]

    @property
    def tier(self) -> int:
        return 2 if self.product is None else 1


def lower(walk: Walk, attention: Attention, term: Term) -> LoweredTerm:
    """Decides roles, masks and where factors go; falls back to logits as a whole (tier 2)."""
    if term.scores is not None:
        try:
            return _lower(walk, attention, term)
        except FailedMatch:
            if attention.form == "sdpa":
                raise
            term = replace(term, scores=None)
    try:
        return _lower(walk, attention, term)
    except FailedMatch as why:
        if term.softmax.columns is None or term.softmax.unknown_columns is not None:
            raise
        return _lower(walk, attention, replace(term, softmax=sinks.without_sink(term.softmax, term.keys, str(why))))


def _lower(walk: Walk, attention: Attention, term: Term) -> LoweredTerm:
    value, scores, qk = peeled(attention.value), term.scores, None
    if scores is not None:
        qk = Product(peeled(scores.product.query), peeled(scores.product.key))
        scores = replace(scores, added=tuple(peeled(x) if isinstance(x, Bias) else x for x in scores.added))
        weak = [m.fill for m in scores.masks if m.fill > BIG / 10]  # a number behind the mask has made it smaller
        if weak:
            raise FailedMatch(f"masked scores get the value {weak[0]:g}, which is not large enough to be a mask")
        term = replace(term, scores=scores)
    dims = attention_dims(attention, term, qk, value)
    _check_mixed(term, dims)
    if term.softmax.unknown_columns is not None and term.masks:
        raise FailedMatch("the probabilities are masked, and some of them cut out")
    mask = lower_mask(walk, term, dims.rows, dims.keys)
    factors = () if scores is None else scores.factors
    dims = _with_gated_heads(_with_batch(dims, term, mask), (*term.factors, *factors))
    on_key, on_query = _by_keys(factors, dims, "the scores are multiplied by a tensor over query and key")
    on_value, on_out = _by_keys(term.factors, dims, "the probabilities are multiplied by a tensor over query and key")
    sink = term.softmax.sink
    if isinstance(sink, Operand) and set(free_axes(sink.layout)) - set(leaves(dims.query_heads)):
        raise FailedMatch("a sink depends on more than the head")
    return LoweredTerm(term, dims, mask, qk, value, on_query, on_key, on_value, on_out)


def _by_keys(factors: Sequence[Factor], dims: AttentionDims, why: str) -> tuple[list[Factor], list[Factor]]:
    """Factors that run over the keys, and the others. FailedMatch(why): one runs over queries too."""
    own: Dim = (*dims.rows, *dims.group)
    if any(f.over(dims.keys) and f.over(own) for f in factors):
        raise FailedMatch(why)
    return [f for f in factors if f.over(dims.keys)], [f for f in factors if not f.over(dims.keys)]


def _with_batch(dims: AttentionDims, term: Term, mask: LoweredMask) -> AttentionDims:
    """Roles in which documents, which the operator has for each batch entry, do not differ between heads.

    A single axis that query and key share is taken for heads, and may as well be the batch.
    """
    ids = [x for d in mask.documents for x in (d.query, d.key)]
    if (
        any(x.over(dims.heads) for x in (*ids, *mask.keep))
        and not dims.batch
        and not isinstance(term.softmax.sink, Operand)
    ):
        dims = replace(dims, batch=dims.heads, heads=())
    if any(x.over(dims.query_heads) for x in ids):
        raise FailedMatch("documents differ between heads")
    return dims


def _with_gated_heads(dims: AttentionDims, factors: Sequence[Factor]) -> AttentionDims:
    """Dims without groups where a factor per key differs between the query heads of one key head.

    ``(probs * gate) @ repeat(value)`` is ``probs @ (gate.mT * repeat(value))``: each query head has its own values.
    """
    if any(f.over(dims.group) and f.over(dims.keys) for f in factors):
        return replace(dims, heads=dims.query_heads, group=())
    return dims


def _check_mixed(term: Term, dims: AttentionDims) -> None:
    """FailedMatch where probabilities are mixed across so many heads that a rewrite would cost more than it saves.

    Each head's probs then meet the values of all heads, side by side. Forward and backward on a CPU took 1.2 times
    the model's own time for 4 heads of 48 (n = 2048), and 3.7 times for 8 (n = 1024).
    """
    if any(f.over(term.mixed) and f.over(dims.out) for f in term.factors):
        width = product(leaves(dims.out))
        if not isinstance(width, int) or width > _WIDEST:
            raise FailedMatch(f"probabilities are mixed across heads whose values, side by side, are {width} wide")


def bias_is_dense(walk: Walk, lowered: LoweredTerm) -> bool:
    """Whether the scores have a term, made of activations, for each query and key: its gradient is M x N."""
    dims, biases = lowered.dims, lowered.mask.biases
    if any(not b.over(dims.keys) for b in biases):
        return True  # the maximum of each row, which beside a sink does not cancel
    return any(
        b.over(dims.rows)
        and b.over(dims.keys)
        and level(walk.context, b.value) >= Level.COMPUTED
        and b.value.dtype.is_floating_point
        and b.wants_gradient
        for b in biases
    )
