"""Decides everything about an attention that depends on the model: roles of axes, masks, where factors go, the tier."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fx_passes.canonicalise.attention_dims import AttentionDims, attention_dims, peeled
from fx_passes.canonicalise.axes import FailedMatch, all_axes, free_axes, leaves, product
from fx_passes.canonicalise.columns import wide
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Attention, Bias, Factor, Scores, Sink, Term, Walk, level
from fx_passes.canonicalise.masks import LoweredMask, lower_mask, wants_gradient
from fx_passes.canonicalise.positional_mask import PositionalMask
from fx_passes.find.context import Level

_WIDEST = 256  # values that the kernels take


@dataclass
class LoweredTerm:
    """A term with everything decided: nothing can fail that depends on the model any more."""

    term: Term
    scores: Scores
    dims: AttentionDims
    mask: LoweredMask
    query: Operand | None
    key: Operand | None
    value: Operand
    on_query: list[Factor] = field(default_factory=list)
    on_key: list[Factor] = field(default_factory=list)
    on_value: list[Factor] = field(default_factory=list)
    on_out: list[Factor] = field(default_factory=list)

    @property
    def tier(self) -> int:
        return 1 if self.query is not None else 2


def lower(walk: Walk, attention: Attention, term: Term) -> LoweredTerm:
    """Decides roles, masks and where factors go; falls back to logits as a whole (tier 2)."""
    scores = term.scores
    assert scores is not None
    if scores.query is not None:
        try:
            return _lower(walk, attention, term, scores)
        except FailedMatch as why:
            if attention.form == "sdpa":
                raise
            scores = Scores(scores.whole, sink=scores.sink, why=str(why))
    try:
        return _lower(walk, attention, term, scores)
    except FailedMatch as why:
        if term.extension is None or scores.wide is not None:
            raise
        return _lower(walk, attention, term, wide(term, str(why)))


def _lower(walk: Walk, attention: Attention, term: Term, scores: Scores) -> LoweredTerm:
    value = peeled(attention.value)
    query = None if scores.query is None else peeled(scores.query)
    key = None if scores.key is None else peeled(scores.key)
    scores = replace(scores, biases=[_peeled_bias(b) for b in scores.biases])
    if scores.sink is not None and scores.sink.operand is not None:
        scores = replace(scores, sink=Sink(peeled(scores.sink.operand)))
    dims = attention_dims(attention, term, scores, value, query, key)
    _check_mixed(term, dims)
    if scores.wide is not None and term.masks:
        raise FailedMatch(scores.why)
    found = lower_mask(walk, scores, term, dims.rows, dims.keys)
    if found is None:
        raise FailedMatch("probabilities are set to zero behind softmax at positions that the scores do not mask")
    if attention.causal:
        if found.biases or found.keep:
            raise FailedMatch("is_causal together with a mask")
        found.positional = PositionalMask(right=0)
    dims = _with_gated_heads(_with_batch(dims, scores, found), term, scores)
    lowered = LoweredTerm(term, scores, dims, found, query, key, value)
    own, keys = set(leaves((*dims.rows, *dims.group))), set(leaves(dims.keys))
    for factor in scores.factors:
        axes = set(factor.axes)
        if axes & keys and axes & own:
            raise FailedMatch("the scores are multiplied by a tensor over query and key")
        (lowered.on_key if axes & keys else lowered.on_query).append(factor)
    for factor in term.factors:
        axes = set(factor.axes)
        if axes & keys and axes & own:
            raise FailedMatch("the probabilities are multiplied by a tensor over query and key")
        (lowered.on_value if axes & keys else lowered.on_out).append(factor)
    if scores.sink is not None and scores.sink.operand is not None:
        heads = set(leaves(dims.query_heads))
        if set(free_axes(scores.sink.operand.layout)) - heads:
            raise FailedMatch("a sink depends on more than the head")
    if found.positional.prefix and not isinstance(found.positional.prefix, int):
        raise FailedMatch("a prefix of unknown length")
    return lowered


def _with_batch(dims: AttentionDims, scores: Scores, found: LoweredMask) -> AttentionDims:
    """Roles in which documents, which the operator has for each batch entry, do not differ between heads.

    A single axis that query and key share is taken for heads, and may as well be the batch.
    """
    operands = [x for d in found.documents for x in (d.query, d.key)]
    some_heads = set(leaves(dims.heads))
    touched = [x for x in (*operands, *(s.operand for s in found.keep)) if some_heads & set(all_axes(x.layout))]
    if touched and not dims.batch and (scores.sink is None or scores.sink.operand is None):
        dims = replace(dims, batch=dims.heads, heads=())
    heads = set(leaves(dims.query_heads))
    if any(heads & set(all_axes(x.layout)) for x in operands):
        raise FailedMatch("documents differ between heads")
    return dims


def _with_gated_heads(dims: AttentionDims, term: Term, scores: Scores) -> AttentionDims:
    """Dims without groups where a factor per key differs between the query heads of one key head.

    ``(probs * gate) @ repeat(value)`` is ``probs @ (gate.mT * repeat(value))``: each query head has its own values.
    """
    group, keys = set(leaves(dims.group)), set(leaves(dims.keys))
    if any(group & set(f.axes) and keys & set(f.axes) for f in (*term.factors, *scores.factors)):
        return replace(dims, heads=dims.query_heads, group=())
    return dims


def _check_mixed(term: Term, dims: AttentionDims) -> None:
    """FailedMatch where probabilities are mixed across so many heads that a rewrite would cost more than it saves.

    Each head's probs then meet the values of all heads, side by side. Forward and backward on a CPU took 1.2 times
    the model's own time for 4 heads of 48 (n = 2048), and 3.7 times for 8 (n = 1024).
    """
    if any(set(leaves(term.mixed)) & set(f.axes) and set(leaves(dims.out)) & set(f.axes) for f in term.factors):
        width = product(leaves(dims.out))
        if not isinstance(width, int) or width > _WIDEST:
            raise FailedMatch(f"probabilities are mixed across heads whose values, side by side, are {width} wide")


def _peeled_bias(bias: Bias) -> Bias:
    value = peeled(Operand(bias.value, bias.layout))
    return replace(bias, value=value.value, layout=value.layout)


def bias_is_dense(walk: Walk, lowered: LoweredTerm) -> bool:
    """Whether the scores have a term, made of activations, for each query and key: its gradient is M x N."""
    own, keys = set(leaves(lowered.dims.rows)), set(leaves(lowered.dims.keys))
    if any(not keys & set(all_axes(b.layout)) for b in lowered.mask.biases):
        return True  # the maximum of each row, which beside a sink does not cancel
    return any(
        own & set(all_axes(b.layout))
        and keys & set(all_axes(b.layout))
        and level(walk.context, b.value) >= Level.COMPUTED
        and b.value.dtype.is_floating_point
        and wants_gradient(b)
        for b in lowered.mask.biases
    )
