"""Attention sinks: a logit per row that has no value, joined to the scores as a column or added to their row sum.

    torch.cat([scores, sink], -1).softmax(-1)[..., :-1]                               Softmax(scores, sink=sink)
    F.pad(scores, (1, 0)).softmax(-1)[..., 1:]                                        Softmax(scores, sink=0.0)
    e = exp(scores); e / (1 + e.sum(-1, keepdim=True))                                Softmax(scores, sink=0.0)
    e = exp(scores - m); e / (exp(sink - m) + e.sum(-1, keepdim=True))                Softmax(scores, sink=sink)

Columns that are no sink stay: softmax runs over all of them, and the logits are taken as a whole (tier 2).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fx_passes.canonicalise.axes import Dim, FailedMatch, Operand, known, leaves, product
from fx_passes.canonicalise.forms import BIG, Columns, Softmax, Walk
from fx_passes.canonicalise.operators import SUMS
from fx_passes.canonicalise.views import is_cast, peeled, top, uncast
from fx_passes.find.trace import Value

aten = torch.ops.aten


def of_row_sum(softmax: Softmax, added: float | Operand) -> Softmax:
    """The softmax that exp is over its row sum and something more. A shift of both by one tensor cancels."""
    softmax = replace(softmax, normalised=True)
    if isinstance(added, float):
        return replace(softmax, sink=math.log(added))
    added = top(added)
    if added.value.op is not aten.exp.default:
        raise FailedMatch("the probabilities are divided by their sum and a tensor that is no exponential")
    logit, scores = top(added.side(added.value.args[0])), uncast(softmax.source.value)
    if _is_shift(scores):
        shift, source = uncast(scores.args[1]), softmax.source.side(scores.args[0])
        if logit.value.op is aten.neg.default and uncast(logit.value.args[0]) is shift:
            return replace(softmax, source=source, sink=0.0)
        if _is_shift(logit.value) and uncast(logit.value.args[1]) is shift:
            return replace(softmax, source=source, sink=peeled(logit.side(logit.value.args[0])))
    return replace(softmax, sink=logit)


def _is_shift(value: Value) -> bool:
    return value.op is aten.sub.Tensor and isinstance(value.args[1], Value) and not value.kwargs


def of_columns(walk: Walk, softmax: Softmax, columns: Dim, keys: Dim, start: int) -> Softmax:
    """The softmax over `keys` that one over all `columns` is, of which the first key is at `start`."""
    whole = Columns(softmax.source, columns, start)
    mark = len(walk.visited)
    try:
        source, sink = _sink(walk, softmax.source, whole, keys)
        return replace(softmax, source=source, sink=sink, columns=whole)
    except FailedMatch as why:
        del walk.visited[mark:]
        return without_sink(replace(softmax, columns=whole), keys, str(why))


def without_sink(softmax: Softmax, keys: Dim, why: str) -> Softmax:
    """The same softmax with columns of which no more is known. FailedMatch(why) where their number is symbolic."""
    columns = softmax.columns
    if columns is None or not all(isinstance(axis.size, int) for axis in leaves((*keys, *columns.dim))):
        raise FailedMatch(why)
    mine = set(leaves(columns.dim))
    layout = tuple(keys if set(leaves(dim)) == mine else dim for dim in columns.source.layout)
    return replace(softmax, source=Operand(columns.source.value, layout), sink=None)


def _sink(walk: Walk, x: Operand, columns: Columns, keys: Dim) -> tuple[Operand, Operand | float]:
    """What stands in the columns that get a value, and what in the single one that does not."""
    value, args, n = x.value, x.value.args, product(leaves(keys))
    walk.visited.append(value)
    dim = next(i for i, d in enumerate(x.layout) if set(leaves(d)) == set(leaves(columns.dim)))
    narrow, one = (Operand(value, (*x.layout[:dim], d, *x.layout[dim + 1 :])) for d in (keys, ()))
    shifted = value.op in SUMS and isinstance(args[1], Value) and not x.side(args[1]).over(columns.dim)
    if shifted or is_cast(value):
        return _sink(walk, x.side(args[0]), columns, keys)
    if not known(columns.dim[0].size == n + 1):
        raise FailedMatch("softmax has more than one column without a value")
    if value.op is aten.constant_pad_nd.default:
        pads, i = list(args[1]), 2 * (len(x.layout) - 1 - dim)
        if i + 1 < len(pads) and sum(map(abs, pads)) == 1 and pads[i : i + 2] == [columns.start, 1 - columns.start]:
            return replace(narrow, value=args[0]), float(args[2]) if len(args) > 2 else 0.0
    if value.op is aten.cat.default and (args[1] if len(args) > 1 else 0) % len(x.layout) == dim:
        parts = args[0] if columns.start == 0 else args[0][::-1]
        if len(parts) == 2 and known(parts[0].shape[dim] == n) and columns.start in (0, 1):
            return replace(narrow, value=parts[0]), peeled(replace(one, value=parts[1]))
    raise FailedMatch("columns are added to the scores in a way that was not understood")


def outlives_masks(walk: Walk, softmax: Softmax) -> bool:
    """Whether a sink takes all the weight of a row in which every score is a mask value."""
    if isinstance(softmax.sink, Operand):
        constant = walk.constant(softmax.sink.value)
        return constant is None or bool((constant > BIG / 10).all())
    return softmax.sink is not None and softmax.sink > BIG / 10
