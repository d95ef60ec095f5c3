"""Proves that a product is an attention: which softmaxes are in it, over which axes, with which scores and masks."""

from __future__ import annotations

from dataclasses import replace

import torch

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, all_axes, broadcast, fresh, known, leaves
from fx_passes.canonicalise.columns import scores
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.contraction import Operand, contraction, is_contraction
from fx_passes.canonicalise.forms import Attention, Bias, Factor, Mask, Scores, Term, Walk, level
from fx_passes.canonicalise.normalise import normalise
from fx_passes.canonicalise.operators import name
from fx_passes.canonicalise.probs import mixes
from fx_passes.canonicalise.reader import ProbsReader, contains_qk_product
from fx_passes.canonicalise.rules import PROBS
from fx_passes.canonicalise.softmax import divisor, row_sum, softmax_input, through_views
from fx_passes.canonicalise.views import after, is_cast, is_view
from fx_passes.find.context import Level
from fx_passes.find.trace import Trace, Value

aten = torch.ops.aten
_MOST = 80  # operations behind a softmax in which products with V are looked for


def is_attention_softmax(walk: Walk, soft: Value) -> bool:
    """Whether a softmax, or an exponential that may be a part of one, is taken of a product of two activations."""
    source, dim = softmax_input(soft) or (soft.args[0], len(soft.shape) - 1)
    if not source.shape:
        return False
    layout, keys = fresh(source.shape), (Axis(source.shape[dim]),)
    layout = (*layout[:dim], keys, *layout[dim + 1 :])
    return contains_qk_product(walk, source, layout, keys)


def products(trace: Trace, soft: Value) -> tuple[list[Value], list[str]]:
    """The products that a softmax's result enters, through operations with a rule; and the operations without one."""
    found: list[Value] = []
    ends: set[str] = set()
    seen: set[Value] = set()
    todo = [soft]
    while todo and len(seen) < _MOST:
        value = todo.pop()
        if value in seen:
            continue
        seen.add(value)
        for user in trace.users(value):
            if is_contraction(user):
                found += [] if user in found else [user]
                todo += [user] if mixes(trace.context, user) else []
            elif user.op in PROBS or is_view(user) or is_cast(user):
                todo.append(user)
            else:
                ends.add(name(user))
    return found, sorted(ends)


def match_attention(trace: Trace, constants: Constants, product: Value) -> tuple[Attention, Walk]:
    """The attention whose product with V is `product`.

    Raises:
        FailedMatch: the reason.
    """
    reason: FailedMatch | None = None
    unclear = ""
    for flipped in (False, True):
        walk = Walk(trace, constants)
        c = contraction(product, fresh(product.shape))
        side, value = (c.right, c.left) if flipped else (c.left, c.right)
        reader = ProbsReader(walk, c.summed)
        walk.visit(product)
        try:
            terms = reader.read(side.value, side.layout)
            if terms is not None:
                return _attention(walk, product, c.layout, terms, side, value, c.summed), walk
        except FailedMatch as why:
            reason = reason or why
        unclear = unclear or reader.shared.unclear
    raise reason or FailedMatch(unclear or "no softmax is in the product")


def _attention(
    walk: Walk, out: Value, layout: Layout, terms: list[Term], side: Operand, value: Operand, summed: Dim
) -> Attention:
    keys = set(leaves(summed))
    for i, term in enumerate(terms):
        over = set(leaves(term.keys if term.extension is None else term.extension[0]))
        if not over or not over <= keys or over & set(leaves(term.mixed)):
            raise FailedMatch("softmax is not taken over the axis that the product with value sums over")
        terms[i] = replace(term, mixed=(*leaves(term.mixed), *(a for a in leaves(summed) if a not in over)))
    if level(walk.context, value.value) < Level.COMPUTED:
        raise FailedMatch("value is a parameter, not an activation")
    done = sorted([t if t.plain else _with_scores(walk, t, len(terms) == 1) for t in terms], key=lambda t: t.plain)
    if done[0].plain:
        raise FailedMatch("softmax is not taken of a product of two activations")
    for term in done:
        _check_value(walk, term, value, summed)
    if done[-1].plain and any(set(leaves(t.keys if t.extension is None else t.extension[0])) != keys for t in done):
        raise FailedMatch(
            "something is added to the probabilities, and the product with value sums over more than the keys"
        )
    if not all(t.normalised for t in done):
        out, layout, done = _normalised_later(walk, out, layout, done, summed, through_views(side))
    _check_regions(walk)
    return Attention(out, layout, done, value, _form(done), walk.visited)


def _with_scores(walk: Walk, term: Term, alone: bool) -> Term:
    """A term with its scores. Beside others, a softmax of something else is a tensor of probabilities (ConViT)."""
    try:
        return replace(term, scores=scores(walk, term))
    except FailedMatch:
        if alone or term.dropout or term.masks or term.extension is not None or not term.normalised:
            raise
    factors = [Factor(term.soft, term.source.layout), *term.factors]
    return Term(term.soft, term.source, term.keys, term.scale, factors, plain=True, mixed=term.mixed)


def _check_value(walk: Walk, term: Term, value: Operand, summed: Dim) -> None:
    """FailedMatch where the product with value is one of scores with scores, such as an entropy."""
    found, inner = term.scores, through_views(value)
    if inner.value.op is aten.softmax.int and set(leaves(inner.layout[inner.value.args[1]])) & set(leaves(summed)):
        raise FailedMatch("value is a softmax over the same keys")
    over = set(leaves(term.keys if term.extension is None else term.extension[0]))
    others = {axis for axis in leaves(summed) if axis not in over}  # summed over, too
    if found is None or found.query is None or found.key is None:
        if others and not term.plain:
            raise FailedMatch("the product with value sums over more than the keys")
        return
    rows = set(all_axes(found.query.layout)) - set(all_axes(found.key.layout))
    if others & rows:
        raise FailedMatch("the product with value sums over the rows")
    if rows & set(all_axes(value.layout)) and contains_qk_product(walk, value.value, value.layout, summed):
        raise FailedMatch("value is made of scores")


def _normalised_later(
    walk: Walk, out: Value, layout: Layout, terms: list[Term], summed: Dim, unnormalised: Operand
) -> tuple[Value, Layout, list[Term]]:
    """exp(scores) @ V divided by the row sums of exp(scores)."""
    if len(terms) != 1 or terms[0].mixed or terms[0].extension is not None:
        raise FailedMatch("exp is not normalised before the product with value")
    value = out
    for _ in range(20):
        users = walk.trace.users(value)
        if len(users) != 1:
            break
        user = users[0]
        walk.visit(user)
        below = _divided_by(user, value, layout)
        if below is not None:
            found = row_sum(below.value, below.layout, unnormalised.value, unnormalised.layout, summed)
            if found is None or not all(known(a == b) for a, b in zip(user.shape, value.shape, strict=True)):
                break
            terms = normalise(walk, terms, summed, found)
            return user, layout, [replace(term, scores=scores(walk, term)) for term in terms]
        moved = after(user, layout) if is_view(user) and user.args[0] is value else layout if is_cast(user) else None
        if moved is None:
            break
        value, layout = user, moved
    raise FailedMatch("exp is not divided by its row sums")


def _divided_by(user: Value, value: Value, layout: Layout) -> Operand | None:
    """What an operation divides a value with a layout by, also where it multiplies by the reciprocal."""
    if user.op not in (aten.div.Tensor, aten.mul.Tensor) or not all(isinstance(x, Value) for x in user.args):
        return None
    if user.op is aten.div.Tensor:
        return Operand(user.args[1], broadcast(layout, user.args[1].shape)) if user.args[0] is value else None
    other = user.args[1] if user.args[0] is value else user.args[0]
    return divisor(other, broadcast(layout, other.shape))


def _check_regions(walk: Walk) -> None:
    for value in walk.visited:
        if value.home is not None and not walk.context.state[value.home].grad:
            raise FailedMatch("a part of it is computed without gradient")


def _form(terms: list[Term]) -> str:
    terms = [t for t in terms if not t.plain]
    spelled = "softmax" if all(t.soft.op is aten.softmax.int for t in terms) else "exp"
    if len(terms) > 1:
        return f"{len(terms)} x {spelled}, one product"
    scores = terms[0].scores
    if scores is None or scores.query is None:
        return f"logits-{spelled}-matmul"
    return f"matmul-{spelled}-matmul"


def match_sdpa(trace: Trace, constants: Constants, call: Value) -> tuple[Attention, Walk]:
    """A call of scaled_dot_product_attention as an attention."""
    walk = Walk(trace, constants)
    walk.visit(call)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    lead = fresh(call.shape[:-2])
    groups: Layout = lead
    if given.get("enable_gqa") and len(lead) and not known(query.shape[-3] == key.shape[-3]):
        heads, few = query.shape[-3], key.shape[-3]
        head = (Axis(few), Axis(heads // few)) if not known(few == 1) else (Axis(heads),)
        lead = (*lead[:-1], head)
        groups = (*lead[:-1], head[:1] if not known(few == 1) else ())
    rows, columns = fresh(query.shape[-2:-1])[0], (Axis(key.shape[-2]),)
    feature, out = fresh(query.shape[-1:])[0], fresh(value.shape[-1:])[0]
    logits: Layout = (*lead, rows, columns)
    q = Operand(query, (*broadcast(lead, query.shape[:-2]), rows, feature))
    k = Operand(key, (*broadcast(groups, key.shape[:-2]), columns, feature))
    v = Operand(value, (*broadcast(groups, value.shape[:-2]), columns, out))
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    fixed = isinstance(scale, (int, float))
    found = Scores(Operand(call, logits), query=q, key=k, scale=float(scale) if fixed else 1.0)
    if not fixed:
        found.factors.append(Factor.number(scale))
    if isinstance(mask, Value):
        side = broadcast(logits, mask.shape)
        if mask.dtype == torch.bool:
            found.masks.append(Mask(mask, side, True, -torch.inf))
        else:
            found.biases.append(Bias(mask, side))
    term = Term(call, found.whole, columns, dropout=float(given.get("dropout_p") or 0.0), scores=found)
    _check_regions(walk)
    attention = Attention(
        call, (*lead, rows, out), [term], v, "sdpa", walk.visited, causal=bool(given.get("is_causal"))
    )
    return attention, walk
