"""Which products are those of query and key, and along which axes scores stay scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fx_passes.canonicalise.axes import Axis, Dim, Layout, all_axes, before_reduction, known, leaves
from fx_passes.canonicalise.contraction import Contraction
from fx_passes.canonicalise.forms import arguments, level
from fx_passes.canonicalise.operators import LARGEST
from fx_passes.canonicalise.views import is_cast, is_view
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Value

if TYPE_CHECKING:
    from fx_passes.canonicalise.reader import ScoresReader

aten = torch.ops.aten


def is_activations_product(context: Context, c: Contraction, keys: Dim) -> bool:
    """Whether a product is that of two activations and the keys are an axis of its result."""
    mine = set(leaves(keys))
    left, right = set(all_axes(c.left.layout)) & mine, set(all_axes(c.right.layout)) & mine
    if not (left or right) or mine & set(leaves(c.summed)):
        return False
    return min(level(context, c.left.value), level(context, c.right.value)) >= Level.COMPUTED


def has_rows(c: Contraction, keys: Dim, kept: list[Axis]) -> bool:
    """Whether the rows of a product, if it has such, are among the axes that are kept."""
    mine, left, right = set(leaves(keys)), set(all_axes(c.left.layout)), set(all_axes(c.right.layout))
    if left & mine and right & mine:
        rows = left ^ right
    else:
        rows = right - left if left & mine else left - right
    return not rows or bool(rows & set(leaves(kept)))


def is_softmax(value: Value) -> bool:
    """Whether an operand is a softmax as it is: its product is a weighted sum, not scores."""
    while is_view(value) or is_cast(value) or value.op is aten.dropout.default:
        value = value.args[0]
    return value.op is aten.softmax.int


def along_dimensions(reader: ScoresReader, value: Value, layout: Layout) -> bool:
    """Whether an operation along some dimensions has scores for an operand.

    What it takes from a dimension is another axis, which may be the keys'. The largest of scores along other axes are
    scores, too, as BiDAF's context looks at the query.
    """
    if value.op in LARGEST:
        return reader.read(value.args[0], _with_reduced(reader, value, layout)) is not None
    mine = set(leaves(reader.keys))
    for source in arguments(value):
        if source.fake is None or len(source.shape) != len(layout) or not source.dtype.is_floating_point:
            continue
        new, over = [], reader.keys
        for i, (dim, a, b) in enumerate(zip(layout, source.shape, value.shape, strict=True)):
            channels = i == 1 and value.op is aten.convolution.default
            if known(a == b) and not channels:
                new.append(dim)
                continue
            if channels and set(leaves(dim)) & mine:
                return False
            axis = () if known(a == 1) else (Axis(a),)
            over = axis if set(leaves(dim)) & mine else over
            if not channels and set(leaves(dim)) & set(leaves(reader.shared.rows)):
                reader.shared.rows.extend(axis)
            new.append(axis)
        inner = reader if over is reader.keys else reader.with_keys(over)
        if inner.read(source, tuple(new)) is not None:
            return True
    return False


def _with_reduced(reader: ScoresReader, value: Value, layout: Layout) -> Layout:
    """The layout of what is reduced; the axes over which it is are new, and may be rows."""
    source = value.args[0]
    given = value.args[1] if isinstance(value.args[1], (list, tuple)) else [value.args[1]]
    dims, keepdim = {d % len(source.shape) for d in given}, len(value.args) > 2 and bool(value.args[2])
    found = before_reduction(source.shape, dims, keepdim, layout)
    reader.shared.rows.extend(axis for i in dims for axis in found[i])
    return found
