"""Rules for probabilities: what stands between a softmax and the product with V, as a sum of terms with factors.

A rule gets a reader and a value with its layout. It gives None where no operand is probabilities, and raises
FailedMatch, with the reason, where they are used in a way that the operator cannot express.

    F.dropout(scores.softmax(-1), 0.1) * gate - other.softmax(-1)
    [Term(softmax=scores, dropout=0.1, factors=(gate,)), Term(softmax=other, scale=-1)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fx_passes.canonicalise import sinks
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Operand, before_reduction, known, leaves
from fx_passes.canonicalise.contraction import contraction, is_contraction, operands
from fx_passes.canonicalise.forms import Dropout, Factor, Plain, Softmax, Term, level
from fx_passes.canonicalise.operators import DIVISIONS
from fx_passes.canonicalise.readings import choices, computed
from fx_passes.canonicalise.row_sums import divisor, normalise, one_softmax, row_sum
from fx_passes.canonicalise.softmax import softmax_input
from fx_passes.canonicalise.views import chunk_of, top, uncast
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value

if TYPE_CHECKING:
    from fx_passes.canonicalise.reader import ProbsReader

aten = torch.ops.aten
Terms = Sequence[Plain]


def softmax(reader: ProbsReader, x: Operand) -> Terms:
    """``scores.softmax(dim)``, ``exp(log_softmax(scores))``, or ``exp(scores)``, whose row sum follows."""
    found = softmax_input(x.value)
    if found is not None:
        source, dim = found
        return [Term(x.layout[dim], softmax=Softmax(x.value, Operand(source, x.layout)))]
    source = x.value.args[0]
    return [Term(reader.keys, softmax=Softmax(x.value, Operand(source, x.layout), normalised=False))]


def negated(reader: ProbsReader, x: Operand) -> Terms | None:
    terms = reader.operand(x, x.value.args[0])
    return terms and [replace(t, scale=-t.scale) for t in terms]


def mixes(context: Context, value: Value) -> bool:
    """Whether a value is a product with a parameter, which may mix the probabilities of heads."""
    return is_contraction(value) and any(level(context, x) <= Level.PARAMETER for x in operands(value))


def mixed(reader: ProbsReader, x: Operand) -> Terms | None:
    """``einsum("bhij,hg->bgij", probs, parameter)``: a factor for each pair of heads, and a sum over softmax's."""
    if not mixes(reader.walk.context, x.value):
        return None
    c = contraction(x)
    for side, other in ((c.left, c.right), (c.right, c.left)):
        terms = reader.read(side)
        if terms is not None:
            if other.over(reader.keys):
                raise FailedMatch("the probabilities enter another product before the one with value")
            factor = Factor(other.value, other.layout)
            return [replace(t, factors=(*t.factors, factor), mixed=(*t.mixed, *c.summed)) for t in terms]
    return None


def summed(reader: ProbsReader, x: Operand) -> Terms | None:
    """``probs.sum(heads)``, ``probs.mean(heads)``: one term, summed over axes other than the keys."""
    if is_contraction(x.value):
        return mixed(reader, x)
    source = x.value.args[0]
    layout, dims = before_reduction(x.value, x.layout)
    layout = tuple(() if i in dims and known(source.shape[i] == 1) else dim for i, dim in enumerate(layout))
    over = [axis for i in dims for axis in layout[i]]
    terms = reader.read(Operand(source, layout))
    if terms is None:
        return None
    count = math.prod(axis.size for axis in over) if x.value.op is aten.mean.dim else 1
    if not dims or not isinstance(count, int) or x.value.kwargs.get("dtype") not in (None, source.dtype):
        raise FailedMatch("the probabilities are summed in a way that was not understood")
    return [replace(t, scale=t.scale / count, mixed=(*t.mixed, *over)) for t in terms]


def dropped(reader: ProbsReader, x: Operand) -> Terms | None:
    """``dropout(probs, p)``."""
    terms = reader.operand(x, x.value.args[0])
    if terms is None:
        return None
    if len(one_softmax(terms)) > 1:
        raise FailedMatch("dropout acts on a sum of softmaxes")
    (term,) = one_softmax(terms)
    if term.dropout is not None:
        raise FailedMatch("the probabilities go through two dropouts")
    if not term.softmax.normalised:
        raise FailedMatch("dropout acts before the probabilities are normalised")
    if x.value.args[1] >= 1:
        raise FailedMatch("dropout drops every weight")
    return [replace(term, dropout=Dropout(float(x.value.args[1]), x.value))]


def multiplied(reader: ProbsReader, x: Operand) -> Terms | None:
    """``probs * factor``, ``probs / factor``, and ``exp(scores) / its row sum``, which is a softmax."""
    a, b = x.value.args[:2]
    divides = x.value.op in DIVISIONS
    terms = reader.operand(x, a)
    if terms is None or not divides:
        others = reader.operand(x, b)
        if terms is None and others is None:
            return None
        if terms is not None and others is not None:
            raise FailedMatch("two softmaxes are multiplied with one another")
        if divides:
            raise FailedMatch("a softmax divides")
        if terms is None:
            terms, a, b = others, b, a
    assert terms is not None
    if x.value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the probabilities are rounded")
    if not isinstance(b, (Value, int, float)):
        raise FailedMatch("the probabilities are multiplied by a number that depends on a dynamic size")
    if not isinstance(b, Value):
        return [replace(t, scale=t.scale / b if divides else t.scale * b) for t in terms]
    side = x.side(b)
    inverse = None if divides else divisor(side)
    divides, side = divides or inverse is not None, inverse or side
    more = row_sum(side, x.side(a), reader.keys) if divides else None
    # An epsilon beside the sum of weights that are normalised already makes it a factor like any other.
    epsilon = any(isinstance(n, float) for n in more or ()) and len(terms) == 1 and terms[0].normalised
    if more is not None and not epsilon:
        return normalise(reader.walk, terms, reader.keys, more)
    narrow = top(side)
    if len(narrow.axes) < len(side.axes):  # it was repeated, perhaps along the keys
        side = narrow
    factor = Factor(side.value, side.layout, -1 if divides else 1)
    return [replace(t, factors=(*t.factors, factor)) for t in terms]


def added(reader: ProbsReader, x: Operand) -> Terms | None:
    """``probs - factor * other_probs``: a term for each; a number added to all keys is a term without softmax."""
    sign = float(x.value.kwargs.get("alpha", 1)) * (-1.0 if x.value.op is aten.sub.Tensor else 1.0)
    sides = [(v, reader.operand(x, v), scale) for v, scale in zip(x.value.args[:2], (1.0, sign), strict=True)]
    if all(terms is None for _, terms, _ in sides):
        return None
    found: list[Plain] = []
    for side, terms, scale in sides:
        found += [replace(t, scale=t.scale * scale) for t in terms or [_plain(reader, x, side)]]
    return found


def _plain(reader: ProbsReader, x: Operand, side: Any) -> Plain:
    """A number, or a tensor that is the same for all keys, that is added to probabilities."""
    if isinstance(side, (int, float)):
        return Plain(reader.keys, float(side))
    if not isinstance(side, Value) or x.side(side).over(reader.keys):
        raise FailedMatch("something else than a softmax is added to the probabilities")
    return Plain(reader.keys, factors=(Factor(side, x.side(side).layout),))


def nan_replaced(reader: ProbsReader, x: Operand) -> Terms | None:
    """``nan_to_num(probs)``: rows that see no key have zero probabilities in the operator anyway."""
    terms = reader.operand(x, x.value.args[0])
    if terms is not None and any(v not in (None, 0, 0.0) for v in (*x.value.args[1:], *x.value.kwargs.values())):
        raise FailedMatch("NaN probabilities are replaced by a number that is not zero")
    return terms and one_softmax(terms)


def filled(reader: ProbsReader, x: Operand) -> Terms | None:
    """``probs.masked_fill(hidden, 0)``: a mask, if the scores have it too; a factor where it is one of rows."""
    if not reader.any_operand(x):
        return None
    for kept, mask in choices(reader.walk, x):
        found = reader.operand(x, kept) if mask.fill == 0 else None
        if found is None:
            continue
        terms, condition = one_softmax(found), mask.value
        if not mask.keep and condition.op is aten.isnan.default and uncast(condition.args[0]) is uncast(kept):
            return terms  # as nan_to_num
        if not mask.over(reader.keys):
            kept_rows = condition if mask.keep else computed(aten.logical_not.default, condition)
            return [replace(t, factors=(*t.factors, Factor(kept_rows, mask.layout))) for t in terms]
        if any(t.dropout is not None for t in terms):
            raise FailedMatch("the probabilities are masked after dropout")
        return [replace(t, masks=(*t.masks, mask)) for t in terms]
    raise FailedMatch("the probabilities are masked in a way that was not understood")


def cut(reader: ProbsReader, x: Operand) -> Terms | None:
    """``softmax(columns)[..., :n]``: what stays are the keys, what is cut off is a sink, or unknown."""
    given: tuple[Any, ...] = (*x.value.args, *(0, 0, None, 1)[len(x.value.args) - 1 :])
    source, dim, start, _, step = given
    dim, start = dim % len(x.layout), start or 0
    keys = x.layout[dim]
    part = None if set(leaves(reader.keys)) & set(leaves(keys)) else chunk_of(x.value, x.layout)
    if part is not None:
        return reader.read(Operand(source, part))
    columns: Dim = (Axis(source.shape[dim]),)
    terms = reader.with_keys(columns).read(Operand(source, (*x.layout[:dim], columns, *x.layout[dim + 1 :])))
    if terms is None:
        return None
    others = (known(a == b) for i, (a, b) in enumerate(zip(x.value.shape, source.shape, strict=True)) if i != dim)
    along_keys = set(leaves(keys)) == set(leaves(reader.keys))
    if not along_keys or step != 1 or not isinstance(start, int) or start < 0 or not all(others):
        raise FailedMatch("a part of the probabilities is cut out before the product with value")
    return [_among_columns(reader, t, columns, keys, start) for t in terms]


def _among_columns(reader: ProbsReader, term: Plain, columns: Dim, keys: Dim, start: int) -> Plain:
    if not isinstance(term, Term):
        return replace(term, keys=keys)
    if term.softmax.columns is not None:
        raise FailedMatch("the probabilities are cut twice")
    if set(leaves(term.keys)) != set(leaves(columns)):
        raise FailedMatch("softmax is not taken over the axis that the product with value sums over")
    return replace(term, keys=keys, softmax=sinks.of_columns(reader.walk, term.softmax, columns, keys, start))
