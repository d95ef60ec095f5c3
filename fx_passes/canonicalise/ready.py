"""Decides everything about an attention that depends on the model: roles of axes, masks, where factors go, the tier."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fx_passes.canonicalise.axes import NotUnderstood, all_axes, free_axes, leaves, product
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Attention, Bias, Factor, Scores, Sink, Term, Walk, level
from fx_passes.canonicalise.masks import Plan, plan, wants_gradient
from fx_passes.canonicalise.places import Places
from fx_passes.canonicalise.roles import Roles, peeled, roles
from fx_passes.canonicalise.scores import wide
from fx_passes.find.context import Level

_WIDEST = 256  # values that the kernels take


@dataclass
class Ready:
    """A term with everything decided: nothing can fail that depends on the model any more."""

    term: Term
    scores: Scores
    roles: Roles
    plan: Plan
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


def prepare(walk: Walk, attention: Attention, term: Term) -> Ready:
    """Decides roles, masks and where factors go; falls back to logits as a whole (tier 2)."""
    scores = term.scores
    assert scores is not None
    if scores.query is not None:
        try:
            return _prepare(walk, attention, term, scores)
        except NotUnderstood as why:
            if attention.form == "sdpa":
                raise
            scores = Scores(scores.whole, sink=scores.sink, why=str(why))
    try:
        return _prepare(walk, attention, term, scores)
    except NotUnderstood as why:
        if term.extension is None or scores.wide is not None:
            raise
        return _prepare(walk, attention, term, wide(term, str(why)))


def _prepare(walk: Walk, attention: Attention, term: Term, scores: Scores) -> Ready:
    value = peeled(attention.value)
    query = None if scores.query is None else peeled(scores.query)
    key = None if scores.key is None else peeled(scores.key)
    scores = replace(scores, biases=[_peeled_bias(b) for b in scores.biases])
    if scores.sink is not None and scores.sink.operand is not None:
        scores = replace(scores, sink=Sink(peeled(scores.sink.operand)))
    role = roles(attention, term, scores, value, query, key)
    _check_mixed(term, role)
    if scores.wide is not None and term.masks:
        raise NotUnderstood(scores.why)
    found = plan(walk, scores, term, role.rows, role.keys)
    if found is None:
        raise NotUnderstood("weights are set to zero behind softmax in places that the scores do not mask")
    if attention.causal:
        if found.biases or found.keep:
            raise NotUnderstood("is_causal together with a mask")
        found.places = Places(right=0)
    role = _with_batch(role, scores, found)
    ready = Ready(term, scores, role, found, query, key, value)
    own, keys = set(leaves((*role.rows, *role.group))), set(leaves(role.keys))
    for factor in scores.factors:
        axes = set(factor.axes)
        if axes & keys and axes & own:
            raise NotUnderstood("the scores are multiplied by a tensor over query and key")
        (ready.on_key if axes & keys else ready.on_query).append(factor)
    for factor in term.factors:
        axes = set(factor.axes)
        if axes & keys and axes & own:
            raise NotUnderstood("the weights are multiplied by a tensor over query and key")
        (ready.on_value if axes & keys else ready.on_out).append(factor)
    if scores.sink is not None and scores.sink.operand is not None:
        heads = set(leaves(role.query_heads))
        if set(free_axes(scores.sink.operand.layout)) - heads:
            raise NotUnderstood("a sink depends on more than the head")
    if found.places.prefix and not isinstance(found.places.prefix, int):
        raise NotUnderstood("a prefix of unknown length")
    return ready


def _with_batch(role: Roles, scores: Scores, found: Plan) -> Roles:
    """Roles in which documents, which the operator has for each batch entry, do not differ between heads.

    A single axis that query and key share is taken for heads, and may as well be the batch.
    """
    operands = [x for d in found.documents for x in (d.query, d.key)]
    some_heads = set(leaves(role.heads))
    touched = [x for x in (*operands, *(s.operand for s in found.keep)) if some_heads & set(all_axes(x.layout))]
    if touched and not role.batch and (scores.sink is None or scores.sink.operand is None):
        role = replace(role, batch=role.heads, heads=())
    heads = set(leaves(role.query_heads))
    if any(heads & set(all_axes(x.layout)) for x in operands):
        raise NotUnderstood("documents differ between heads")
    return role


def _check_mixed(term: Term, role: Roles) -> None:
    """NotUnderstood where weights are mixed across so many heads that a rewrite would cost more than it saves.

    Each head's weights then meet the values of all heads, side by side. Forward and backward on a CPU took 1.2 times
    the model's own time for 4 heads of 48 (n = 2048), and 3.7 times for 8 (n = 1024).
    """
    if any(set(leaves(term.mixed)) & set(f.axes) and set(leaves(role.out)) & set(f.axes) for f in term.factors):
        width = product(leaves(role.out))
        if not isinstance(width, int) or width > _WIDEST:
            raise NotUnderstood(f"weights are mixed across heads whose values, side by side, are {width} wide")


def _peeled_bias(bias: Bias) -> Bias:
    value = peeled(Operand(bias.value, bias.layout))
    return replace(bias, value=value.value, layout=value.layout)


def bias_is_dense(walk: Walk, ready: Ready) -> bool:
    """Whether the scores have a term, made of activations, for each query and key: its gradient is M x N."""
    own, keys = set(leaves(ready.roles.rows)), set(leaves(ready.roles.keys))
    if any(not keys & set(all_axes(b.layout)) for b in ready.plan.biases):
        return True  # the maximum of each row, which beside a sink does not cancel
    return any(
        own & set(all_axes(b.layout))
        and keys & set(all_axes(b.layout))
        and level(walk.context, b.value) >= Level.COMPUTED
        and b.value.dtype.is_floating_point
        and wants_gradient(b)
        for b in ready.plan.biases
    )
