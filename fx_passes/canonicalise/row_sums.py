"""Sums and mixes of softmaxes that are normalised again: each softmax's rows sum to one, so the row sum is known.

p = a * softmax(s) + b * softmax(t)     (ConViT)      p = einsum("hij,hg->gij", softmax(s), mix)
(p / p.sum(-1)) @ v                                   (p / p.sum(-1)) @ v

a / (a + b) * softmax(s) @ v + b / (a + b) * softmax(t) @ v       mix / mix.sum(heads) in place of mix
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, leaves, product, resolve
from fx_passes.canonicalise.forms import Factor, Term
from fx_passes.canonicalise.readings import computed

aten = torch.ops.aten


def over_row_sums(terms: list[Term], keys: Dim) -> list[Term]:
    """The terms over the sum of their factors, which is that of their rows."""
    for term in terms:
        has_sink = term.sink is not None or term.extension is not None
        if term.plain or term.dropout or term.masks or not term.normalised or has_sink:
            raise FailedMatch("a sum of probabilities whose rows do not sum to one is normalised")
        if any(set(leaves(keys)) & set(f.axes) for f in term.factors):
            raise FailedMatch("the probabilities are multiplied by a tensor over query and key, and normalised again")
    axes = tuple(dict.fromkeys(a for t in terms for f in t.factors for a in f.axes if a not in leaves(t.mixed)))
    total: Any = None
    for term in terms:
        found = _row_sum(term, axes)
        total = found if total is None else total + found if axes == () else computed(aten.add.Tensor, total, found)
    if axes == ():
        return [replace(t, scale=t.scale / total) for t in terms]
    layout: Layout = tuple((axis,) for axis in axes)
    return [replace(t, factors=[*t.factors, Factor(total, layout, -1)]) for t in terms]


def _row_sum(term: Term, axes: Dim) -> Any:
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
