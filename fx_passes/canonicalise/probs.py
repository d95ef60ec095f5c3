"""Rules for probabilities: what stands between a softmax and the product with V, as a sum of terms with factors.

A rule gets a reader, a value and the value's layout. It gives None where no operand is probabilities, and raises
FailedMatch, with the reason, where they are used in a way that the operator cannot express.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fx_passes.canonicalise.axes import (
    Axis,
    Dim,
    FailedMatch,
    Layout,
    all_axes,
    before_reduction,
    broadcast,
    known,
    leaves,
)
from fx_passes.canonicalise.contraction import Operand, contraction, is_contraction, operands
from fx_passes.canonicalise.forms import Factor, Mask, Term, arguments, level
from fx_passes.canonicalise.normalise import normalise, one_softmax
from fx_passes.canonicalise.operators import DIVISIONS
from fx_passes.canonicalise.readings import choices, computed
from fx_passes.canonicalise.softmax import divisor, row_sum, softmax_input, through, through_views
from fx_passes.canonicalise.views import chunk_of
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value

if TYPE_CHECKING:
    from fx_passes.canonicalise.reader import ProbsReader

aten = torch.ops.aten


def softmax(reader: ProbsReader, value: Value, layout: Layout) -> list[Term]:
    """``scores.softmax(dim)``, ``exp(log_softmax(scores))``, or ``exp(scores)``, whose row sum follows."""
    found = softmax_input(value)
    if found is not None:
        return [Term(value, Operand(found[0], layout), layout[found[1]])]
    return [Term(value, Operand(value.args[0], layout), reader.keys, normalised=False)]


def negated(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    terms = reader.read(value.args[0], layout)
    return None if terms is None else [replace(t, scale=-t.scale) for t in terms]


def mixes(context: Context, value: Value) -> bool:
    """Whether a value is a product with a parameter, which may mix the probabilities of heads."""
    return is_contraction(value) and any(level(context, x) <= Level.PARAMETER for x in operands(value))


def mixed(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``einsum("bhij,hg->bgij", probs, parameter)``: a factor for each pair of heads, and a sum over softmax's."""
    if not mixes(reader.walk.context, value):
        return None
    c = contraction(value, layout)
    for side, other in ((c.left, c.right), (c.right, c.left)):
        terms = reader.read(side.value, side.layout)
        if terms is not None:
            if reader.over_keys(other.layout):
                raise FailedMatch("the probabilities enter another product before the one with value")
            factor = Factor(other.value, other.layout)
            return [replace(t, factors=[*t.factors, factor], mixed=(*t.mixed, *c.summed)) for t in terms]
    return None


def summed(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``probs.sum(heads)``, ``probs.mean(heads)``: one term, summed over axes other than the keys."""
    if is_contraction(value):
        return mixed(reader, value, layout)
    source, dims = value.args[0], {d % len(value.args[0].shape) for d in value.args[1] or ()}
    full = before_reduction(source.shape, dims, len(value.args) > 2 and bool(value.args[2]), layout)
    full = tuple(
        () if i in dims and known(n == 1) else dim for i, (n, dim) in enumerate(zip(source.shape, full, strict=True))
    )
    over = [axis for i in sorted(dims) for axis in full[i]]
    terms = reader.read(source, full)
    if terms is None:
        return None
    count = math.prod(axis.size for axis in over) if value.op is aten.mean.dim else 1
    if not dims or not isinstance(count, int) or value.kwargs.get("dtype") not in (None, source.dtype):
        raise FailedMatch("the probabilities are summed in a way that was not understood")
    return [replace(t, scale=t.scale / count, mixed=(*t.mixed, *over)) for t in terms]


def dropped(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``dropout(probs, p)``."""
    terms = reader.read(value.args[0], layout)
    if terms is None:
        return None
    one_softmax(terms)
    if len(terms) > 1:
        raise FailedMatch("dropout acts on a sum of softmaxes")
    if terms[0].dropout:
        raise FailedMatch("the probabilities go through two dropouts")
    if not terms[0].normalised:
        raise FailedMatch("dropout acts before the probabilities are normalised")
    if value.args[1] >= 1:
        raise FailedMatch("dropout drops every weight")
    return [replace(terms[0], dropout=float(value.args[1]), shared_dropout=value)]


def multiplied(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``probs * factor``, ``probs / factor``, and ``exp(scores) / its row sum``, which is a softmax."""
    a, b = value.args[0], value.args[1]
    divides = value.op in DIVISIONS
    terms = reader.operand(a, layout)
    if terms is None or not divides:
        others = reader.operand(b, layout)
        if terms is None and others is None:
            return None
        if terms is not None and others is not None:
            raise FailedMatch("two softmaxes are multiplied with one another")
        if divides:
            raise FailedMatch("a softmax divides")
        if terms is None:
            terms, a, b = others, b, a
    assert terms is not None
    if value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the probabilities are rounded")
    if not isinstance(b, (Value, int, float)):
        raise FailedMatch("the probabilities are multiplied by a number that depends on a dynamic size")
    if not isinstance(b, Value):
        return [replace(t, scale=t.scale / b if divides else t.scale * b) for t in terms]
    inner, side = broadcast(layout, a.shape), broadcast(layout, b.shape)
    inverse = None if divides else divisor(b, side)
    if inverse is not None:
        b, side, divides = inverse.value, inverse.layout, True
    total = row_sum(b, side, a, inner, reader.keys) if divides else None
    if total is not None and not (total.extra and len(terms) == 1 and terms[0].normalised):
        return normalise(reader.walk, terms, reader.keys, total)
    narrow = through_views(Operand(b, side))
    if len(all_axes(narrow.layout)) < len(all_axes(side)):  # it was repeated, perhaps along the keys
        b, side = narrow.value, narrow.layout
    factor = Factor(b, side, -1 if divides else 1)
    return [replace(t, factors=[*t.factors, factor]) for t in terms]


def added(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``probs - factor * other_probs``: a term for each; a number added to all keys is a term without softmax."""
    sign = float(value.kwargs.get("alpha", 1)) * (-1.0 if value.op is aten.sub.Tensor else 1.0)
    sides = [(x, reader.operand(x, layout), scale) for x, scale in zip(value.args[:2], (1.0, sign), strict=True)]
    if all(terms is None for _, terms, _ in sides):
        return None
    found: list[Term] = []
    for side, terms, scale in sides:
        if terms is None:
            found.append(_plain(reader, value, side, layout, scale))
        else:
            found += [replace(t, scale=t.scale * scale) for t in terms]
    return sorted(found, key=lambda t: t.plain)


def _plain(reader: ProbsReader, soft: Value, side: Any, layout: Layout, scale: float) -> Term:
    """A number, or a tensor that is the same for all keys, that is added to probabilities."""
    if isinstance(side, (int, float)):
        return Term(soft, Operand(soft, layout), reader.keys, scale=scale * side, plain=True)
    outer = broadcast(layout, side.shape) if isinstance(side, Value) else layout
    if not isinstance(side, Value) or reader.over_keys(outer):
        raise FailedMatch("something else than a softmax is added to the probabilities")
    return Term(soft, Operand(side, outer), reader.keys, scale=scale, factors=[Factor(side, outer)], plain=True)


def nan_replaced(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``nan_to_num(probs)``: rows that see no key have zero probabilities in the operator anyway."""
    terms = reader.read(value.args[0], layout)
    if terms is None:
        return None
    if any(x not in (None, 0, 0.0) for x in (*value.args[1:], *value.kwargs.values())):
        raise FailedMatch("NaN probabilities are replaced by a number that is not zero")
    return one_softmax(terms)


def filled(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``probs.masked_fill(hidden, 0)``: a mask, if the scores have it too; a factor where it is one of rows."""
    if all(reader.operand(x, layout) is None for x in arguments(value)):
        return None
    for kept, fill, condition, keep in choices(reader.walk, value):
        terms = reader.operand(kept, layout)
        if fill != 0 or terms is None:
            continue
        one_softmax(terms)
        if not keep and condition.op is aten.isnan.default and through(condition.args[0]) is through(kept):
            return terms  # as nan_to_num
        mask = Mask(condition, broadcast(layout, condition.shape), keep, 0.0)
        if not reader.over_keys(mask.layout):
            factor = Factor(condition if keep else computed(aten.logical_not.default, condition), mask.layout)
            return [replace(t, factors=[*t.factors, factor]) for t in terms]
        if any(t.dropout for t in terms):
            raise FailedMatch("the probabilities are masked after dropout")
        return [replace(t, masks=[*t.masks, mask]) for t in terms]
    raise FailedMatch("the probabilities are masked in a way that was not understood")


def cut(reader: ProbsReader, value: Value, layout: Layout) -> list[Term] | None:
    """``softmax(columns)[..., :n]``: what stays are the keys, what is cut off are sinks."""
    dim = value.args[1] % len(value.shape) if len(value.args) > 1 else 0
    start = value.args[2] if len(value.args) > 2 and value.args[2] is not None else 0
    source = value.args[0]
    step = value.args[4] if len(value.args) > 4 else 1
    part = None if set(leaves(reader.keys)) & set(leaves(layout[dim])) else chunk_of(value, layout)
    if part is not None:
        return reader.read(source, part)
    keys: Dim = (Axis(source.shape[dim]),)
    terms = reader.with_keys(keys).read(source, (*layout[:dim], keys, *layout[dim + 1 :]))
    if terms is None:
        return None
    others = (known(a == b) for i, (a, b) in enumerate(zip(value.shape, source.shape, strict=True)) if i != dim)
    along_keys = set(leaves(layout[dim])) == set(leaves(reader.keys))
    if not along_keys or step != 1 or not isinstance(start, int) or start < 0 or not all(others):
        raise FailedMatch("a part of the probabilities is cut out before the product with value")
    if any(t.extension is not None for t in terms):
        raise FailedMatch("the probabilities are cut twice")
    return [replace(t, extension=(layout[dim], start)) for t in terms]
