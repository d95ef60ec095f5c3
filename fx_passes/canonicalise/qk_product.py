"""Whether scores derive from a product of two activations, one of which runs over the keys."""

from __future__ import annotations

import operator

import torch

from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, all_axes, broadcast, known, leaves
from fx_passes.canonicalise.contraction import Contraction, contraction, is_contraction
from fx_passes.canonicalise.forms import arguments, level
from fx_passes.canonicalise.views import before, is_cast, is_view
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value, partly_written

aten = torch.ops.aten
_LIMIT = 200
# What mixes along dimensions that it keeps: what it makes of scores is scores.
_KEEPING = {
    aten.softmax.int, aten.log_softmax.int,
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


def contains_qk_product(context: Context, value: Value, layout: Layout, keys: Dim) -> bool:
    """Whether a value is, elementwise or rearranged, made of a product of two activations that runs over `keys`.

    The product's rows, if it has such, must be an axis of the value too. Else what a linear layer makes of an
    attention's result, over whose features the layer sums, would be scores of its rows.
    """
    return _contains_qk_product(
        context, value, layout, keys, set(), [axis for axis in all_axes(layout) if axis not in leaves(keys)]
    )


def _has_rows(c: Contraction, keys: Dim, kept: list[Axis]) -> bool:
    left, right = set(all_axes(c.left.layout)), set(all_axes(c.right.layout))
    rows = left ^ right if left & set(leaves(keys)) and right & set(leaves(keys)) else _others(left, right, keys)
    return not rows or bool(rows & set(leaves(kept)))


def _is_softmax(value: Value) -> bool:
    """Whether an operand is a softmax as it is: its product is a weighted sum, not scores."""
    while is_view(value) or is_cast(value) or value.op is aten.dropout.default:
        value = value.args[0]
    return value.op is aten.softmax.int


def _others(left: set[Axis], right: set[Axis], keys: Dim) -> set[Axis]:
    return right - left if left & set(leaves(keys)) else left - right


def _contains_qk_product(
    context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int], kept: list[Axis]
) -> bool:
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
                return _has_rows(c, keys, kept) and not (_is_softmax(c.left.value) or _is_softmax(c.right.value))
            return any(_mixes(context, o.value, o.layout, keys, seen, kept) for o in (c.left, c.right))
        if is_view(value) or is_cast(value):
            inner = before(value, layout) if is_view(value) else layout
            return _contains_qk_product(context, value.args[0], inner, keys, seen, kept)
        if torch.Tag.pointwise in getattr(value.op, "tags", ()) or value.op in _ELEMENTWISE:
            return any(
                _contains_qk_product(context, v, broadcast(layout, v.shape), keys, seen, kept)
                for v in arguments(value)
                if v.fake is not None
            )
        if value.op is partly_written:
            return _contains_qk_product(context, value.args[0], layout, keys, seen, kept)
        if value.op in (aten.amax.default, aten.max.dim):
            return _largest(context, value, layout, keys, seen, kept)
        if value.op in _RANGES:
            return _ranges(context, value, layout, keys, seen, kept)
    except FailedMatch:
        return False
    return False


def _mixes(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int], kept: list[Axis]) -> bool:
    return bool(set(leaves(keys)) & set(all_axes(layout))) and _contains_qk_product(
        context, value, layout, keys, seen, kept
    )


def _largest(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int], kept: list[Axis]) -> bool:
    """The largest of scores along other axes, as BiDAF's context looks at the query."""
    source = value.args[0]
    given = value.args[1] if isinstance(value.args[1], (list, tuple)) else [value.args[1]]
    dims, keepdim = {d % len(source.shape) for d in given}, len(value.args) > 2 and bool(value.args[2])
    rest = iter(layout)
    wide: list[Dim] = []
    for i, size in enumerate(source.shape):
        if i in dims:
            wide.append((Axis(size),))
            kept.extend(wide[-1])
        if i not in dims or keepdim:
            dim = next(rest)
            wide += [] if i in dims else [dim]
    return _contains_qk_product(context, source, tuple(wide), keys, seen, kept)


def _ranges(context: Context, value: Value, layout: Layout, keys: Dim, seen: set[int], kept: list[Axis]) -> bool:
    """Operations along one dimension: what they take from it is another axis, which may be the keys'."""
    mine = set(leaves(keys))
    for source in arguments(value):
        if source.fake is None or len(source.shape) != len(layout) or not source.dtype.is_floating_point:
            continue
        new, over = [], keys
        for i, (dim, a, b) in enumerate(zip(layout, source.shape, value.shape, strict=True)):
            mixed = i == 1 and value.op is aten.convolution.default  # its channels
            if known(a == b) and not mixed:
                new.append(dim)
                continue
            if mixed and set(leaves(dim)) & mine:
                return False
            axis = () if known(a == 1) else (Axis(a),)
            over = axis if set(leaves(dim)) & mine else over
            if not mixed and set(leaves(dim)) & set(leaves(kept)):
                kept.extend(axis)
            new.append(axis)
        if _contains_qk_product(context, source, tuple(new), over, seen, kept):
            return True
    return False


__all__ = ["contains_qk_product", "is_activations_product"]
