"""Whether scores derive from a product of two activations, one of which runs over the keys."""

from __future__ import annotations

import operator

import torch

from fx_passes.canonicalise.axes import Axis, Dim, Layout, NotUnderstood, all_axes, broadcast, known, leaves
from fx_passes.canonicalise.contraction import Contraction, contraction, is_contraction
from fx_passes.canonicalise.forms import arguments, level
from fx_passes.canonicalise.views import before, is_cast, is_view
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value, partly_written

aten = torch.ops.aten
_LIMIT = 200
# What mixes along dimensions that it keeps: what it makes of scores is scores.
_KEEPING = {
    aten.tril.default, aten.triu.default, aten.cumsum.default, aten.flip.default, aten.convolution.default,
    aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.index_put.default, aten.masked_scatter.default,
    aten.native_layer_norm.default, aten.native_batch_norm.default, aten.native_group_norm.default,
    aten.index_select.default, aten.index.Tensor, aten.slice_scatter.default, aten.select_scatter.default,
}  # fmt: skip
# Elementwise, though PyTorch does not tag them so.
_ELEMENTWISE = {aten.masked_fill.Tensor, aten.dropout.default, aten.hardswish.default, aten.where.ScalarOther}
_RANGES = _KEEPING | {
    aten.slice.Tensor,
    aten.constant_pad_nd.default,
    aten.cat.default,
    aten.roll.default,
    aten.gather.default,
    aten.topk.default,
    aten.sort.default,
}


def is_activations_product(context: Context, c: Contraction, keys: Dim) -> bool:
    """Whether a product is that of two activations and the keys are an axis of its result."""
    mine = set(leaves(keys))
    left, right = set(all_axes(c.left.layout)) & mine, set(all_axes(c.right.layout)) & mine
    if not (left or right) or mine & set(leaves(c.summed)):
        return False
    return min(level(context, c.left.value), level(context, c.right.value)) >= Level.COMPUTED


def carries(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int] | None = None) -> bool:
    """Whether a value is, elementwise or rearranged, made of a product of two activations that runs over `keys`."""
    seen = set() if seen is None else seen
    if value.op is operator.getitem and value.args[1] == 0:
        value = Value(value.args[0].op, value.args[0].args, value.args[0].kwargs, value.fake)
    if id(value) in seen or len(seen) > _LIMIT or value.op is None or not isinstance(value.fake, torch.Tensor):
        return False
    seen.add(id(value))
    if not set(leaves(keys)) & set(all_axes(layout)):
        return False
    try:
        if is_contraction(value):
            c = contraction(value, layout)
            if is_activations_product(context, c, keys):
                return True
            return any(_mixes(context, o.value, o.layout, keys, seen) for o in (c.left, c.right))
        if is_view(value) or is_cast(value):
            return carries(context, value.args[0], before(value, layout) if is_view(value) else layout, keys, seen)
        if torch.Tag.pointwise in getattr(value.op, "tags", ()) or value.op in _ELEMENTWISE:
            return any(
                carries(context, v, broadcast(layout, v.shape), keys, seen)
                for v in arguments(value)
                if v.fake is not None
            )
        if value.op is partly_written:
            return carries(context, value.args[0], layout, keys, seen)
        if value.op in _RANGES:
            return _ranges(context, value, layout, keys, seen)
    except NotUnderstood:
        return False
    return False


def _mixes(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int]) -> bool:
    return bool(set(leaves(keys)) & set(all_axes(layout))) and carries(context, value, layout, keys, seen)


def _ranges(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int]) -> bool:
    """Operations along one dimension: what they take from it is another axis, which may be the keys'."""
    mine = set(leaves(keys))
    for source in arguments(value):
        if source.fake is None or len(source.shape) != len(layout) or not source.dtype.is_floating_point:
            continue
        new, over = [], keys
        for dim, a, b in zip(layout, source.shape, value.shape, strict=True):
            if known(a == b):
                new.append(dim)
                continue
            axis = () if known(a == 1) else (Axis(a),)
            over = axis if set(leaves(dim)) & mine else over
            new.append(axis)
        if carries(context, source, tuple(new), over, seen):
            return True
    return False


__all__ = ["carries", "is_activations_product"]
