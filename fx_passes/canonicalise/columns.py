"""The scores of one softmax, with the columns that have no value: a sink, or columns that are cut off behind it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fx_passes.canonicalise.axes import Dim, FailedMatch, Layout, all_axes, broadcast, known, leaves
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Scores, Sink, Term, Walk
from fx_passes.canonicalise.operators import SUMS
from fx_passes.canonicalise.reader import ScoresReader, contains_qk_product
from fx_passes.canonicalise.scores import with_factor
from fx_passes.canonicalise.views import is_cast
from fx_passes.find.trace import Value

aten = torch.ops.aten


def scores(walk: Walk, term: Term) -> Scores:
    """The canonical form of a term's logits. Where it cannot be had they are taken as a whole, with the reason.

    FailedMatch: they do not derive from a product of two activations, or columns were added in an unknown way.
    """
    value, layout, keys, sink = term.source.value, term.source.layout, term.keys, term.sink
    mark = len(walk.visited)
    if term.extension is not None:
        if not contains_qk_product(walk, value, layout, keys):
            raise FailedMatch(_NO_PRODUCT)
        try:
            value, layout, sink = _columns(walk, value, layout, keys, *term.extension)
        except FailedMatch as reason:
            del walk.visited[mark:]
            return wide(term, str(reason))
        keys = term.extension[0]
    whole = Operand(value, layout)
    found = ScoresReader.of(walk, keys, layout, shifts=sink is None).read(value, layout)
    if found is None and term.extension is None:
        raise FailedMatch(_NO_PRODUCT)
    try:
        if found is None or found.why:
            raise FailedMatch("no product of query and key was found" if found is None else found.why)
        if found.zeroed:
            found = with_factor(replace(found, zeroed=[]), found.zeroed[0])
        _check_axes(found, keys)
    except FailedMatch as reason:
        del walk.visited[mark:]
        return Scores(whole, sink=sink, why=str(reason))
    walk.visited += found.visited
    return replace(found, whole=whole, sink=sink)


_NO_PRODUCT = "softmax is not taken of a product of two activations"


def wide(term: Term, why: str) -> Scores:
    """The logits of a term as a whole, with all columns that softmax runs over."""
    assert term.extension is not None
    keys, start = term.extension
    if not all(isinstance(axis.size, int) for axis in leaves((*keys, *term.keys))):
        raise FailedMatch(why)
    mine = set(leaves(term.keys))
    layout = tuple(keys if set(leaves(dim)) == mine else dim for dim in term.source.layout)
    return Scores(Operand(term.source.value, layout), wide=(term.keys, start), why=why)


def _columns(walk: Walk, value: Value, layout: Layout, wide: Dim, keys: Dim, start: int) -> tuple[Value, Layout, Sink]:
    """What stands in the columns that get a value, and the sink in the one that does not."""
    walk.visit(value)
    total, n = wide[0].size, math.prod(axis.size for axis in leaves(keys))
    dim = next(i for i, d in enumerate(layout) if set(leaves(d)) == set(leaves(wide)))
    narrow = (*layout[:dim], keys, *layout[dim + 1 :])
    if is_cast(value):
        return _columns(walk, value.args[0], layout, wide, keys, start)
    if value.op in SUMS and isinstance(value.args[1], Value):
        side = broadcast(layout, value.args[1].shape)
        if not set(leaves(wide)) & set(all_axes(side)):
            return _columns(walk, value.args[0], broadcast(layout, value.args[0].shape), wide, keys, start)
    if not known(total == n + 1):
        raise FailedMatch("softmax has more than one column without a value")
    if value.op is aten.constant_pad_nd.default:
        pads = list(value.args[1])
        number = float(value.args[2]) if len(value.args) > 2 else 0.0
        i = 2 * (len(layout) - 1 - dim)
        if i + 1 < len(pads) and sum(map(abs, pads)) == 1 and pads[i : i + 2] == ([0, 1] if start == 0 else [1, 0]):
            return value.args[0], narrow, Sink(None, number)
    if value.op is aten.cat.default and (value.args[1] if len(value.args) > 1 else 0) % len(layout) == dim:
        parts = value.args[0]
        order = parts if start == 0 else tuple(reversed(parts))
        if len(parts) == 2 and known(order[0].shape[dim] == n) and start in (0, 1):
            side = (*layout[:dim], (), *layout[dim + 1 :])
            return order[0], narrow, Sink(Operand(order[1], side))
    raise FailedMatch("columns are added to the scores in a way that was not understood")


def _check_axes(found: Scores, keys: Dim) -> None:
    mine = set(leaves(keys))
    for factor in found.factors:
        if mine & set(factor.axes) and set(factor.axes) - mine and found.query is not None and found.key is not None:
            only_query = set(all_axes(found.query.layout)) - set(all_axes(found.key.layout))
            if only_query & set(factor.axes):
                raise FailedMatch("the scores are multiplied by a tensor over query and key")
