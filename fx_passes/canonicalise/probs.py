"""From the probs side of the product with V up to the softmaxes in them: a sum of terms, each with its factors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, all_axes, broadcast, known, leaves
from fx_passes.canonicalise.contraction import Operand, contraction, is_contraction, operands
from fx_passes.canonicalise.forms import Factor, Mask, Sink, Term, Walk, level
from fx_passes.canonicalise.softmax import RowSum, divisor, row_sum, softmax_input, through
from fx_passes.canonicalise.views import before, chunk_of, is_cast, is_view
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value, partly_written

aten = torch.ops.aten
PRODUCTS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
FILLS = {
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
_LIMIT = 60


def leads_to_softmax(context: Context, value: Value, depth: int = 0) -> bool:
    """Whether a softmax is found above a value through operations that `probs` understands."""
    if value.op is None or depth > _LIMIT or not isinstance(value.fake, torch.Tensor):
        return False
    if value.op in (aten.softmax.int, aten.exp.default):
        return True
    if is_view(value) or is_cast(value) or value.op in _PASS:
        return leads_to_softmax(context, value.args[0], depth + 1)
    if value.op in PRODUCTS | SUMS | FILLS:
        return any(isinstance(x, Value) and leads_to_softmax(context, x, depth + 1) for x in value.args[:3])
    if mixes(context, value):
        return any(leads_to_softmax(context, x, depth + 1) for x in operands(value))
    return False


def mixes(context: Context, value: Value) -> bool:
    """Whether a value is a product with a parameter, which may mix the probabilities of heads."""
    return is_contraction(value) and any(level(context, x) <= Level.PARAMETER for x in operands(value))


_PASS = {
    aten.dropout.default,
    aten.neg.default,
    aten.nan_to_num.default,
    aten.slice.Tensor,
    aten.sum.dim_IntList,
    aten.mean.dim,
}


def probs(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    """The terms of a value that is multiplied with V over `keys`; FailedMatch if it has other parts."""
    walk.visit(value)
    found = softmax_input(value)
    if found is not None:
        return [Term(value, Operand(found[0], layout), layout[found[1]])]
    if value.op is aten.exp.default:
        return [Term(value, Operand(value.args[0], layout), keys, normalised=False)]
    if is_view(value):
        return probs(walk, value.args[0], before(value, layout), keys)
    if is_cast(value):
        return probs(walk, value.args[0], layout, keys)
    if value.op is aten.neg.default:
        return [replace(t, scale=-t.scale) for t in probs(walk, value.args[0], layout, keys)]
    if value.op is aten.nan_to_num.default:
        return _nan_to_num(walk, value, layout, keys)
    if value.op is aten.dropout.default:
        return _dropout(walk, value, layout, keys)
    if value.op in PRODUCTS:
        return _product(walk, value, layout, keys)
    if value.op in SUMS:
        return _sum(walk, value, layout, keys)
    if value.op in FILLS:
        return _filled(walk, value, layout, keys)
    if value.op is aten.slice.Tensor:
        return _sliced(walk, value, layout, keys)
    if is_contraction(value):
        return _mixed(walk, value, layout, keys)
    if value.op in (aten.sum.dim_IntList, aten.mean.dim):
        return _summed(walk, value, layout, keys)
    raise FailedMatch(f"the probabilities go through {name(value)} before the product with value")


def name(value: Value) -> str:
    op = value.op
    if op is partly_written:
        return "a write in place"
    return str(getattr(op, "overloadpacket", op)).removeprefix("aten.") if op is not None else "an unknown operation"


def _mixed(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    """Probabilities mixed across heads: a factor for each pair of heads, and a sum over those of the softmax."""
    c = contraction(value, layout)
    for side, other in ((c.left, c.right), (c.right, c.left)):
        if leads_to_softmax(walk.context, side.value) and not set(leaves(keys)) & set(all_axes(other.layout)):
            factor = Factor(other.value, other.layout)
            terms = probs(walk, side.value, side.layout, keys)
            return [replace(t, factors=[*t.factors, factor], mixed=(*t.mixed, *c.summed)) for t in terms]
    raise FailedMatch("the probabilities enter another product before the one with value")


def _summed(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    """Weights summed over axes other than the keys, or their mean."""
    source, dims = value.args[0], {d % len(value.args[0].shape) for d in value.args[1] or ()}
    rest = iter(layout)
    wide: list[Dim] = []
    mixed: list[Axis] = []
    for i, size in enumerate(source.shape):
        if i in dims:
            axis = Axis(size)
            wide.append(() if known(size == 1) else (axis,))
            mixed += wide[-1]
        if i not in dims or (len(value.args) > 2 and value.args[2]):
            dim = next(rest)
            wide += [] if i in dims else [dim]
    count = math.prod(axis.size for axis in mixed) if value.op is aten.mean.dim else 1
    if not dims or not isinstance(count, int) or value.kwargs.get("dtype") not in (None, source.dtype):
        raise FailedMatch("the probabilities are summed in a way that was not understood")
    terms = probs(walk, source, tuple(wide), keys)
    return [replace(t, scale=t.scale / count, mixed=(*t.mixed, *mixed)) for t in terms]


def _not_mixed(terms: list[Term]) -> list[Term]:
    if any(t.mixed for t in terms):
        raise FailedMatch("the probabilities of several heads are mixed before they are dropped, masked or normalised")
    if any(t.plain for t in terms):
        raise FailedMatch("something is added to the probabilities before they are dropped, masked or normalised")
    return terms


def _dropout(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    terms = _not_mixed(probs(walk, value.args[0], layout, keys))
    if len(terms) > 1:
        raise FailedMatch("dropout acts on a sum of softmaxes")
    if terms[0].dropout:
        raise FailedMatch("the probabilities go through two dropouts")
    if not terms[0].normalised:
        raise FailedMatch("dropout acts before the probabilities are normalised")
    if value.args[1] >= 1:
        raise FailedMatch("dropout drops every weight")
    return [replace(terms[0], dropout=float(value.args[1]), shared_dropout=value)]


def _product(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    a, b = value.args[0], value.args[1]
    divides = value.op in (aten.div.Tensor, aten.div.Scalar)
    if value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the probabilities are rounded")
    if not divides and isinstance(b, Value) and leads_to_softmax(walk.context, b):
        if isinstance(a, Value) and leads_to_softmax(walk.context, a):
            raise FailedMatch("two softmaxes are multiplied with one another")
        a, b = b, a
    if not isinstance(a, Value) or not leads_to_softmax(walk.context, a):
        raise FailedMatch("a softmax divides")
    inner = broadcast(layout, a.shape)
    if not isinstance(b, (Value, int, float)):
        raise FailedMatch("the probabilities are multiplied by a number that depends on a dynamic size")
    if not isinstance(b, Value):
        return [replace(t, scale=t.scale / b if divides else t.scale * b) for t in probs(walk, a, inner, keys)]
    side = broadcast(layout, b.shape)
    terms = probs(walk, a, inner, keys)
    inverse = None if divides else divisor(b, side)
    if inverse is not None:
        b, side, divides = inverse.value, inverse.layout, True
    total = row_sum(b, side, a, inner, keys) if divides else None
    if total is not None and not (total.extra and len(terms) == 1 and terms[0].normalised):
        return [normalise(walk, _not_mixed(terms), keys, total)]
    narrow = through_views(Operand(b, side))
    if len(all_axes(narrow.layout)) < len(all_axes(side)):  # it was repeated, perhaps along the keys
        b, side = narrow.value, narrow.layout
    factor = Factor(b, side, -1 if divides else 1)
    return [replace(t, factors=[*t.factors, factor]) for t in terms]


def normalise(walk: Walk, terms: list[Term], keys: Dim, total: RowSum) -> Term:
    """A term over its own row sum: factors of 0 and 1 become masks, those without keys cancel.

    A number added to the sum is a sink, whose logit is the number's logarithm.
    """
    if len(terms) != 1:
        raise FailedMatch("a sum of softmaxes is normalised")
    term = terms[0]
    if term.dropout:
        raise FailedMatch("the probabilities are normalised after dropout")
    masks = list(term.masks)
    for factor in term.factors:
        if not set(leaves(keys)) & set(factor.axes):
            continue
        if factor.power != 1 or not _is_zeros_and_ones(walk, factor.value):
            raise FailedMatch("the probabilities are multiplied by a tensor over query and key, and normalised again")
        masks.append(Mask(factor.value, factor.layout, True, -math.inf))
    if term.scale <= 0:
        raise FailedMatch("the probabilities are scaled by a number that is not positive, and normalised again")
    kept = [replace(m, fill=-math.inf) for m in masks]
    if not total.extra and total.other is None:
        return replace(term, factors=[], masks=kept, scale=1.0, normalised=True)
    if term.normalised or term.factors or term.scale != 1:
        raise FailedMatch("the probabilities are divided by their sum and a number")
    if total.other is None:
        return replace(term, masks=kept, normalised=True, sink=Sink(None, math.log(total.extra)))
    if total.extra:
        raise FailedMatch("the probabilities are divided by their sum, a number and a tensor")
    return replace(_with_sink(term, total.other), masks=kept, normalised=True)


def _with_sink(term: Term, other: Operand) -> Term:
    """A term to whose row sum ``exp(logit)`` was added. A shift of the scores and the logit by one tensor cancels."""
    other = through_views(other)
    if other.value.op is not aten.exp.default:
        raise FailedMatch("the probabilities are divided by their sum and a tensor that is no exponential")
    logit, scores = through_views(Operand(other.value.args[0], other.layout)), through(term.source.value)
    if not _is_shift(scores):
        return replace(term, sink=Sink(logit))
    shift = through(scores.args[1])
    source = Operand(scores.args[0], broadcast(term.source.layout, scores.args[0].shape))
    if logit.value.op is aten.neg.default and through(logit.value.args[0]) is shift:
        return replace(term, source=source, sink=Sink(None, 0.0))
    if _is_shift(logit.value) and through(logit.value.args[1]) is shift:
        kept = logit.value.args[0]
        return replace(term, source=source, sink=Sink(Operand(kept, broadcast(logit.layout, kept.shape))))
    return replace(term, sink=Sink(logit))


def _is_shift(value: Value) -> bool:
    return value.op is aten.sub.Tensor and isinstance(value.args[1], Value) and not value.kwargs


def through_views(operand: Operand) -> Operand:
    """What an operand is a view or cast of, as far as its axes can be followed."""
    value, layout = operand.value, operand.layout
    while is_view(value) or is_cast(value):
        try:
            layout = before(value, layout) if is_view(value) else layout
        except FailedMatch:
            break
        value = value.args[0]
    return Operand(value, layout)


def _is_zeros_and_ones(walk: Walk, value: Value) -> bool:
    """Whether a tensor holds nothing but 0 and 1: a bool tensor as numbers, a constant, or a product of such."""
    while (is_view(value) or is_cast(value)) and value.dtype != torch.bool:
        value = value.args[0]
    if value.dtype == torch.bool or (value.op is aten._to_copy.default and value.args[0].dtype == torch.bool):
        return True
    if value.op is aten.mul.Tensor and all(isinstance(x, Value) for x in value.args):
        return all(_is_zeros_and_ones(walk, x) for x in value.args)
    constant = walk.constant(value)
    return constant is not None and bool(((constant == 0) | (constant == 1)).all())


def _sum(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    a, b = value.args[0], value.args[1]
    sign = float(value.kwargs.get("alpha", 1)) * (-1.0 if value.op is aten.sub.Tensor else 1.0)
    found: list[Term] = []
    for side, scale in ((a, 1.0), (b, sign)):
        if isinstance(side, Value) and leads_to_softmax(walk.context, side):
            terms = probs(walk, side, broadcast(layout, side.shape), keys)
            found += [replace(t, scale=t.scale * scale) for t in terms]
        else:
            found.append(_plain(value, side, layout, keys, scale))
    return sorted(found, key=lambda t: t.plain)


def _plain(soft: Value, side: Any, layout: Layout, keys: Dim, scale: float) -> Term:
    """A number, or a tensor that is the same for all keys, that is added to probabilities."""
    if isinstance(side, (int, float)):
        return Term(soft, Operand(soft, layout), keys, scale=scale * side, plain=True)
    outer = broadcast(layout, side.shape) if isinstance(side, Value) else layout
    if not isinstance(side, Value) or set(leaves(keys)) & set(all_axes(outer)):
        raise FailedMatch("something else than a softmax is added to the probabilities")
    return Term(soft, Operand(side, outer), keys, scale=scale, factors=[Factor(side, outer)], plain=True)


def _nan_to_num(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    if any(x not in (None, 0, 0.0) for x in (*value.args[1:], *value.kwargs.values())):
        raise FailedMatch("NaN probabilities are replaced by a number that is not zero")
    return _not_mixed(
        probs(walk, value.args[0], layout, keys)
    )  # rows that see no key have zero probabilities in the operator


def number_of(walk: Walk, x: Any, buffers: bool = True) -> float | None:
    """A Python number, or what a constant tensor holds in all its elements; `buffers`: also of a buffer."""
    if isinstance(x, (int, float)):
        return float(x)
    if not isinstance(x, Value):
        return None
    filled = x
    while filled.op is aten.detach.default or is_view(filled) or is_cast(filled):
        filled = filled.args[0]
    if filled.op is aten.full.default and isinstance(filled.args[1], (int, float)):
        return float(filled.args[1])  # of any size, also a dynamic one
    constant = walk.constant(x, buffers)
    if constant is None or constant.numel() == 0:
        return None
    first = constant.flatten()[0]
    return float(first) if bool((constant == first).all()) else None


def choices(walk: Walk, value: Value) -> list[tuple[Any, float, Value, bool]]:
    """Readings of masked_fill and where as (kept, fill, condition, condition where kept)."""
    if value.op in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        candidates = [(value.args[0], value.args[2], value.args[1], False)]
    else:
        condition, yes, no = value.args[:3]
        candidates = [(yes, no, condition, True), (no, yes, condition, False)]
    found = []
    for kept, fill, condition, keep in candidates:
        number = number_of(walk, fill)
        if number is not None and isinstance(kept, Value):
            found.append((kept, number, condition, keep))
    return found


def _filled(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    for kept, fill, condition, keep in choices(walk, value):
        if fill != 0 or not leads_to_softmax(walk.context, kept):
            continue
        if not keep and condition.op is aten.isnan.default and through(condition.args[0]) is through(kept):
            return _not_mixed(probs(walk, kept, broadcast(layout, kept.shape), keys))  # as nan_to_num
        mask = Mask(condition, broadcast(layout, condition.shape), keep, 0.0)
        terms = _not_mixed(probs(walk, kept, broadcast(layout, kept.shape), keys))
        if not set(leaves(keys)) & set(all_axes(mask.layout)):
            factor = Factor(condition if keep else _negated(condition), mask.layout)
            return [replace(t, factors=[*t.factors, factor]) for t in terms]
        if any(t.dropout for t in terms):
            raise FailedMatch("the probabilities are masked after dropout")
        return [replace(t, masks=[*t.masks, mask]) for t in terms]
    raise FailedMatch("the probabilities are masked in a way that was not understood")


def _negated(condition: Value) -> Value:
    with condition.fake.fake_mode:
        return Value(aten.logical_not.default, (condition,), {}, torch.logical_not(condition.fake), home=condition.home)


def _sliced(walk: Walk, value: Value, layout: Layout, keys: Dim) -> list[Term]:
    """Columns cut off behind softmax: what stays are the keys, what is cut are sinks."""
    dim = value.args[1] % len(value.shape) if len(value.args) > 1 else 0
    start = value.args[2] if len(value.args) > 2 and value.args[2] is not None else 0
    source = value.args[0]
    step = value.args[4] if len(value.args) > 4 else 1
    part = None if set(leaves(keys)) & set(leaves(layout[dim])) else chunk_of(value, layout)
    if part is not None:
        return probs(walk, source, part, keys)
    if set(leaves(layout[dim])) != set(leaves(keys)) or step != 1 or not isinstance(start, int) or start < 0:
        raise FailedMatch("a part of the probabilities is cut out before the product with value")
    for i, (a, b) in enumerate(zip(value.shape, source.shape, strict=True)):
        if i != dim and not known(a == b):
            raise FailedMatch("a part of the probabilities is cut out before the product with value")
    wide = (Axis(source.shape[dim]),)
    terms = probs(walk, source, (*layout[:dim], wide, *layout[dim + 1 :]), wide)
    if any(t.extension is not None for t in terms):
        raise FailedMatch("the probabilities are cut twice")
    return [replace(t, extension=(layout[dim], start)) for t in terms]
