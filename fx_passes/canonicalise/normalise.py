"""Probabilities over their own row sums: softmax written as exp over a sum, and weights that are normalised again."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fx_passes.canonicalise.axes import Dim, FailedMatch, broadcast, leaves
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Mask, Sink, Term, Walk
from fx_passes.canonicalise.readings import is_zeros_and_ones
from fx_passes.canonicalise.row_sums import over_row_sums
from fx_passes.canonicalise.softmax import RowSum, through, through_views
from fx_passes.find.trace import Value

aten = torch.ops.aten


def one_softmax(terms: list[Term]) -> list[Term]:
    if any(t.mixed for t in terms):
        raise FailedMatch("the probabilities of several heads are mixed before they are dropped, masked or normalised")
    if any(t.plain for t in terms):
        raise FailedMatch("something is added to the probabilities before they are dropped, masked or normalised")
    return terms


def normalise(walk: Walk, terms: list[Term], keys: Dim, total: RowSum) -> list[Term]:
    """A term over its own row sum: factors of 0 and 1 become masks, those without keys cancel.

    A number added to the sum is a sink, whose logit is the number's logarithm.
    """
    if not total.extra and total.other is None and (len(terms) > 1 or terms[0].mixed):
        return over_row_sums(terms, keys)
    one_softmax(terms)
    if len(terms) != 1:
        raise FailedMatch("a sum of softmaxes is normalised")
    term = terms[0]
    if term.dropout:
        raise FailedMatch("the probabilities are normalised after dropout")
    if term.extension is not None:
        raise FailedMatch("a part of the probabilities is cut out, and the rest normalised again")
    masks = list(term.masks)
    for factor in term.factors:
        if not set(leaves(keys)) & set(factor.axes):
            continue
        if factor.power != 1 or not is_zeros_and_ones(walk, factor.value):
            raise FailedMatch("the probabilities are multiplied by a tensor over query and key, and normalised again")
        masks.append(Mask(factor.value, factor.layout, True, -math.inf))
    if term.scale <= 0:
        raise FailedMatch("the probabilities are scaled by a number that is not positive, and normalised again")
    kept = [replace(m, fill=-math.inf) for m in masks]
    if not total.extra and total.other is None:
        return [replace(term, factors=[], masks=kept, scale=1.0, normalised=True, sink=None)]
    if term.normalised or term.factors or term.scale != 1:
        raise FailedMatch("the probabilities are divided by their sum and a number")
    if total.other is None:
        return [replace(term, masks=kept, normalised=True, sink=Sink(None, math.log(total.extra)))]
    if total.extra:
        raise FailedMatch("the probabilities are divided by their sum, a number and a tensor")
    return [replace(_with_sink(term, total.other), masks=kept, normalised=True)]


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
