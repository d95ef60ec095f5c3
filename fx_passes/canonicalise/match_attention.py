"""Proves that a product is an attention: which softmaxes are in it, over which axes, with which scores and masks.

probs.read(left) @ value        Attention(terms, value), if each softmax runs over the axis that is summed
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fx_passes.canonicalise.axes import (
    Axis,
    Dim,
    FailedMatch,
    Layout,
    Operand,
    broadcast,
    fresh,
    known,
    leaves,
    same_shape,
)
from fx_passes.canonicalise.contraction import contraction, is_contraction
from fx_passes.canonicalise.forms import (
    Attention,
    Bias,
    Dropout,
    Factor,
    Mask,
    Plain,
    Product,
    Scores,
    Softmax,
    Term,
    Walk,
    level,
)
from fx_passes.canonicalise.operators import name
from fx_passes.canonicalise.probs import mixes
from fx_passes.canonicalise.reader import ProbsReader, ScoresReader, contains_qk_product
from fx_passes.canonicalise.row_sums import divisor, normalise, row_sum
from fx_passes.canonicalise.rules import PROBS
from fx_passes.canonicalise.softmax import softmax_input
from fx_passes.canonicalise.views import after, is_cast, is_view, top
from fx_passes.find.context import Level
from fx_passes.find.trace import Trace, Value

aten = torch.ops.aten
_MOST = 80  # operations behind a softmax in which products with V are looked for
_NO_PRODUCT = "softmax is not taken of a product of two activations"
_OTHER_AXIS = "softmax is not taken over the axis that the product with value sums over"


def is_attention_softmax(walk: Walk, soft: Value) -> bool:
    """Whether a softmax, or an exponential that may be a part of one, is taken of a product of two activations."""
    source, dim = softmax_input(soft) or (soft.args[0], len(soft.shape) - 1)
    if not source.shape:
        return False
    layout, keys = fresh(source.shape), (Axis(source.shape[dim]),)
    return contains_qk_product(walk, Operand(source, (*layout[:dim], keys, *layout[dim + 1 :])), keys)


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


def match_attention(walk: Walk, product: Value) -> Attention:
    """The attention whose product with V is `product`.

    Raises:
        FailedMatch: the reason.
    """
    reason: FailedMatch | None = None
    unclear = ""
    for flipped in (False, True):
        out = Operand(product, fresh(product.shape))
        c = contraction(out)
        side, value = (c.right, c.left) if flipped else (c.left, c.right)
        reader = ProbsReader(walk, c.summed)
        walk.visited, walk.buffers = [product], set()
        try:
            terms = reader.read(side)
            if terms is not None:
                return _attention(walk, out, terms, side, value, c.summed)
        except FailedMatch as why:
            reason = reason or why
        unclear = unclear or reader.shared.unclear
    raise reason or FailedMatch(unclear or "no softmax is in the product")


def _attention(
    walk: Walk, out: Operand, terms: Sequence[Plain], side: Operand, value: Operand, summed: Dim
) -> Attention:
    keys = set(leaves(summed))
    read: list[Plain] = []
    for term in terms:
        over = set(leaves(term.keys))
        if not over or not over <= keys or over & set(leaves(term.mixed)):
            raise FailedMatch(_OTHER_AXIS)
        read.append(replace(term, mixed=(*leaves(term.mixed), *(a for a in leaves(summed) if a not in over))))
    if level(walk.context, value.value) < Level.COMPUTED:
        raise FailedMatch("value is a parameter, not an activation")
    read = [_with_scores(walk, t, len(read) == 1) if isinstance(t, Term) else t for t in read]
    softmaxes, plain = [t for t in read if isinstance(t, Term)], [t for t in read if not isinstance(t, Term)]
    if not softmaxes:
        raise FailedMatch(_NO_PRODUCT)
    for found in softmaxes:
        _check_value(walk, found, value, summed)
    if plain and any(set(leaves(t.keys)) != keys for t in read):
        raise FailedMatch(
            "something is added to the probabilities, and the product with value sums over more than the keys"
        )
    if not all(t.normalised for t in read):
        if len(read) != 1 or softmaxes[0].mixed or softmaxes[0].softmax.columns is not None:
            raise FailedMatch("exp is not normalised before the product with value")
        out, softmaxes = _normalised_later(walk, out, softmaxes[0], summed, top(side))
    check_regions(walk)
    return Attention(out, softmaxes, plain, value, _form(softmaxes))


def _with_scores(walk: Walk, term: Term, alone: bool) -> Plain:
    """A term with its scores. Beside others, a softmax of something else is a tensor of probabilities (ConViT)."""
    softmax, columns = term.softmax, term.softmax.columns
    if columns is not None and not contains_qk_product(walk, columns.source, columns.dim):
        raise FailedMatch(_NO_PRODUCT)
    if softmax.unknown_columns is not None:
        return term
    try:
        scores = ScoresReader.of(walk, term.keys, softmax.source.layout, softmax.keys_only).read(softmax.source)
    except FailedMatch:
        return term
    if scores is None and columns is None:
        if alone or term.dropout is not None or term.masks or not softmax.normalised:
            raise FailedMatch(_NO_PRODUCT)
        factors = (Factor(softmax.value, softmax.source.layout), *term.factors)
        return Plain(term.keys, term.scale, factors, term.mixed)
    if scores is None or _has_dense_factor(scores, term.keys):
        return term
    walk.visited += scores.visited
    return replace(term, scores=scores)


def _has_dense_factor(scores: Scores, keys: Dim) -> bool:
    """Whether the scores are multiplied by a tensor over query and key."""
    rows = set(scores.product.query.axes) - set(scores.product.key.axes)
    return any(f.over(keys) and rows & set(f.axes) for f in scores.factors)


def _check_value(walk: Walk, term: Term, value: Operand, summed: Dim) -> None:
    """FailedMatch where the product with value is one of scores with scores, such as an entropy."""
    inner = top(value)
    if inner.value.op is aten.softmax.int and set(leaves(inner.layout[inner.value.args[1]])) & set(leaves(summed)):
        raise FailedMatch("value is a softmax over the same keys")
    others = set(leaves(summed)) - set(leaves(term.keys))  # summed over, too
    if term.scores is None:
        if others:
            raise FailedMatch("the product with value sums over more than the keys")
        return
    rows = set(term.scores.product.query.axes) - set(term.scores.product.key.axes)
    if others & rows:
        raise FailedMatch("the product with value sums over the rows")
    if rows & set(value.axes) and contains_qk_product(walk, value, summed):
        raise FailedMatch("value is made of scores")


def _normalised_later(
    walk: Walk, out: Operand, term: Term, summed: Dim, unnormalised: Operand
) -> tuple[Operand, list[Term]]:
    """``exp(scores) @ V`` divided by the row sums of ``exp(scores)``."""
    x = out
    for _ in range(20):
        users = walk.trace.users(x.value)
        if len(users) != 1:
            break
        user = users[0]
        walk.visited.append(user)
        below = _divided_by(user, x)
        if below is not None:
            more = row_sum(below, unnormalised, summed)
            if more is None or not same_shape(user, x.value):
                break
            terms = normalise(walk, [replace(term, scores=None)], summed, more)
            found = [_with_scores(walk, t, True) for t in terms if isinstance(t, Term)]
            return Operand(user, x.layout), [t for t in found if isinstance(t, Term)]
        moved: Layout | None = x.layout if is_cast(user) else None
        if is_view(user) and user.args[0] is x.value:
            moved = after(user, x.layout)
        if moved is None:
            break
        x = Operand(user, moved)
    raise FailedMatch("exp is not divided by its row sums")


def _divided_by(user: Value, x: Operand) -> Operand | None:
    """What an operation divides x by, also where it multiplies by the reciprocal."""
    if user.op not in (aten.div.Tensor, aten.mul.Tensor) or not all(isinstance(v, Value) for v in user.args):
        return None
    if user.op is aten.div.Tensor:
        return x.side(user.args[1]) if user.args[0] is x.value else None
    return divisor(x.side(user.args[1] if user.args[0] is x.value else user.args[0]))


def check_regions(walk: Walk) -> None:
    for value in walk.visited:
        if value.home is not None and not walk.context.state[value.home].grad:
            raise FailedMatch("a part of it is computed without gradient")


def _form(terms: list[Term]) -> str:
    spelled = "softmax" if all(t.softmax.value.op is aten.softmax.int for t in terms) else "exp"
    if len(terms) > 1:
        return f"{len(terms)} x {spelled}, one product"
    return f"{'logits' if terms[0].scores is None else 'matmul'}-{spelled}-matmul"


def match_sdpa(walk: Walk, call: Value) -> Attention:
    """A call of scaled_dot_product_attention as an attention."""
    walk.visited.append(call)
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
    logits = Operand(call, (*lead, rows, columns))
    q = Operand(query, (*broadcast(lead, query.shape[:-2]), rows, feature))
    k = Operand(key, (*broadcast(groups, key.shape[:-2]), columns, feature))
    v = Operand(value, (*broadcast(groups, value.shape[:-2]), columns, out))
    scale = given.get("scale")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    found = Scores(Product(q, k), causal=bool(given.get("is_causal")))
    if isinstance(scale, (int, float)):
        found = replace(found, scale=float(scale))
    else:
        found = replace(found, factors=(Factor.number(scale),))
    if isinstance(mask, Value):
        side = logits.side(mask).layout
        hides = mask.dtype == torch.bool
        found = replace(found, added=(Mask(mask, side, True, -torch.inf) if hides else Bias(mask, side),))
    p = float(given.get("dropout_p") or 0.0)
    term = Term(columns, softmax=Softmax(call, logits), dropout=Dropout(p) if p else None, scores=found)
    check_regions(walk)
    return Attention(Operand(call, (*lead, rows, out)), [term], [], v, "sdpa")
