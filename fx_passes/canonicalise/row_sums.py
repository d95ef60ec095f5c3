"""Probabilities over their row sums: exp over its own sum, weights that are normalised again, and sums of softmaxes.

e = torch.exp(scores)                (e / e.sum(-1, keepdim=True)) @ v         softmax(scores) @ v
p = scores.softmax(-1) * seen        (p / p.sum(-1, keepdim=True)) @ v         softmax(scores where seen) @ v
p = a * s.softmax(-1) + b * t.softmax(-1)                                      (ConViT)
(p / p.sum(-1, keepdim=True)) @ v    a / (a + b) * softmax(s) @ v + b / (a + b) * softmax(t) @ v
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fx_passes.canonicalise import sinks
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, Operand, leaves, product, resolve
from fx_passes.canonicalise.forms import Factor, Mask, Plain, Term, Walk
from fx_passes.canonicalise.operators import CLAMPS_BELOW, LARGEST
from fx_passes.canonicalise.readings import computed, is_zeros_and_ones
from fx_passes.canonicalise.softmax import same
from fx_passes.canonicalise.views import above, shown, uncast
from fx_passes.find.trace import Value

aten = torch.ops.aten
_AGAIN = "the probabilities are multiplied by a tensor over query and key, and normalised again"


def divisor(x: Operand) -> Operand | None:
    """What a value is one over, through views and casts."""
    while x.value.op is not aten.reciprocal.default and not (
        x.value.op is aten.pow.Tensor_Scalar and x.value.args[1] == -1
    ):
        times_one = x.value.op is aten.mul.Tensor and x.value.args[1] == 1
        source = Operand(x.value.args[0], x.layout) if times_one else above(x)
        if source is None:
            return None
        x = source
    return Operand(x.value.args[0], x.layout)


def row_sum(denominator: Operand, numerator: Operand, keys: Dim) -> list[float | Operand] | None:
    """What is added to the sum of `numerator` over the keys, if that is what `denominator` is; else None."""
    x, more = denominator, list[float | Operand]()
    while x.value.op is not aten.sum.dim_IntList:
        op, args = x.value.op, x.value.args
        source = above(x)
        if source is None and op is aten.add.Tensor and not x.value.kwargs:
            total, other = args if _is_sum(args[0]) or not _is_sum(args[1]) else reversed(args)
            several = any(isinstance(n, Operand) for n in more)
            if not (_is_sum(total) and not several if isinstance(other, Value) else isinstance(other, (int, float))):
                return None
            more.append(x.side(other) if isinstance(other, Value) else float(other))
            source = x.side(total)
        elif source is None and op in CLAMPS_BELOW and _is_idle(x.value, numerator.value):
            source = x.side(args[0])
        if source is None:
            return None
        x = source
    summed = x.value.args[0]
    if not x.value.args[1] or not same(summed, numerator.value) or len(summed.shape) != len(numerator.layout):
        return None
    dims = {d % len(summed.shape) for d in x.value.args[1]}
    keepdim = len(x.value.args) > 2 and bool(x.value.args[2])
    rows = tuple(dim for i, dim in enumerate(numerator.layout) if i not in dims)
    rest = tuple(dim for i, dim in enumerate(x.layout) if i not in dims) if keepdim else x.layout
    over = leaves(axis for i, dim in enumerate(numerator.layout) if i in dims for axis in dim)
    if resolve(rows) != resolve(rest) or set(leaves(keys)) != set(over):
        return None
    negative = any(isinstance(n, float) and n < 0 for n in more)
    return None if negative else [n for n in more if n != 0]


def _is_sum(value: Any) -> bool:
    return isinstance(value, Value) and shown(value).op is aten.sum.dim_IntList


def _is_idle(clamp: Value, numerator: Value) -> bool:
    """Whether a clamp of a row sum changes nothing: the largest term of a row is exp(0), hence the sum at least 1."""
    numerator = uncast(numerator)
    if numerator.op is not aten.exp.default or not isinstance(clamp.args[1], (int, float)) or clamp.args[1] > 1:
        return False
    shifted = uncast(numerator.args[0])
    if len(clamp.args) > 2 and clamp.args[2] is not None:
        return False
    if shifted.op is not aten.sub.Tensor or not isinstance(shifted.args[1], Value) or shifted.kwargs:
        return False
    largest = uncast(shifted.args[1])
    while largest.op in (aten.detach.default, operator.getitem):
        largest = largest.args[0]
    return largest.op in LARGEST and same(largest.args[0], shifted.args[0])


def one_softmax(terms: Sequence[Plain]) -> list[Term]:
    """Terms of which none is plain or mixed."""
    if any(t.mixed for t in terms):
        raise FailedMatch("the probabilities of several heads are mixed before they are dropped, masked or normalised")
    found = [t for t in terms if isinstance(t, Term)]
    if len(found) < len(terms):
        raise FailedMatch("something is added to the probabilities before they are dropped, masked or normalised")
    return found


def normalise(walk: Walk, terms: Sequence[Plain], keys: Dim, more: list[float | Operand]) -> Sequence[Plain]:
    """Terms over their row sum, to which something more may be added, which is a sink.

    Of a single term, factors of 0 and 1 become masks, those without keys cancel.
    """
    if not more and (len(terms) > 1 or terms[0].mixed):
        return _over_row_sums(terms, keys)
    if len(one_softmax(terms)) != 1:
        raise FailedMatch("a sum of softmaxes is normalised")
    (term,) = one_softmax(terms)
    if term.dropout is not None:
        raise FailedMatch("the probabilities are normalised after dropout")
    if term.softmax.columns is not None:
        raise FailedMatch("a part of the probabilities is cut out, and the rest normalised again")
    over_keys = [f for f in term.factors if f.over(keys)]
    if not all(f.power == 1 and is_zeros_and_ones(walk, f.value) for f in over_keys):
        raise FailedMatch(_AGAIN)
    if term.scale <= 0:
        raise FailedMatch("the probabilities are scaled by a number that is not positive, and normalised again")
    masks = (*(replace(m, fill=-math.inf) for m in term.masks), *(_mask_of(f) for f in over_keys))
    if not more:
        softmax = replace(term.softmax, normalised=True, sink=None)
        return [replace(term, softmax=softmax, factors=(), masks=masks, scale=1.0)]
    if term.softmax.normalised or term.factors or term.scale != 1 or len(more) > 1:
        raise FailedMatch("the probabilities are divided by their sum and a number")
    return [replace(term, softmax=sinks.of_row_sum(term.softmax, more[0]), masks=masks)]


def _mask_of(factor: Factor) -> Mask:
    return Mask(factor.value, factor.layout, True, -math.inf)


def _over_row_sums(terms: Sequence[Plain], keys: Dim) -> Sequence[Plain]:
    """The terms over the sum of their factors, which is that of their rows: each softmax's rows sum to one."""
    for term in terms:
        if (
            not isinstance(term, Term)
            or not (term.normalised and term.softmax.keys_only)
            or term.dropout is not None
            or term.masks
        ):
            raise FailedMatch("a sum of probabilities whose rows do not sum to one is normalised")
        if any(f.over(keys) for f in term.factors):
            raise FailedMatch(_AGAIN)
    axes = tuple(dict.fromkeys(a for t in terms for f in t.factors for a in f.axes if a not in leaves(t.mixed)))
    totals = [_row_sum(term, axes) for term in terms]
    if not axes:
        return [replace(t, scale=t.scale / sum(totals)) for t in terms]
    total = totals[0]
    for one in totals[1:]:
        total = computed(aten.add.Tensor, total, one)
    layout: Layout = tuple((axis,) for axis in axes)
    return [replace(t, factors=(*t.factors, Factor(total, layout, -1))) for t in terms]


def _row_sum(term: Plain, axes: Dim) -> Any:
    """The sum of a term's rows: its factors, summed over the heads that are mixed. A number, or over these axes."""
    numbers: dict[Any, int] = {}
    args: list[Any] = []
    for factor in term.factors:
        layout = resolve(factor.layout)
        if any(len(dim) > 1 for dim in layout) or any(axis.at is not None for axis in factor.axes):
            raise FailedMatch("probabilities are normalised again in a way that was not understood")
        value = factor.value if factor.power == 1 else computed(aten.reciprocal.default, factor.value)
        labels = [dim[0] if dim else Axis(1) for dim in layout]
        args += [value, [numbers.setdefault(axis, len(numbers)) for axis in labels]]
    repeated = product(axis for axis in leaves(term.mixed) if axis not in numbers)
    if not isinstance(repeated, int):
        raise FailedMatch("probabilities are summed over a dynamic size, and normalised again")
    if not args:
        return term.scale * repeated
    value = computed(torch.einsum, *args, [numbers[axis] for axis in axes if axis in numbers])
    for i, axis in enumerate(axes):
        value = value if axis in numbers else computed(aten.unsqueeze.default, value, i)
    return computed(aten.mul.Tensor, value, term.scale * repeated)
