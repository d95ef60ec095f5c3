"""Which products are those of query and key, and along which axes scores stay scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fx_passes.canonicalise.axes import Axis, Dim, Operand, before_reduction, known, leaves
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
    if not (c.left.over(keys) or c.right.over(keys)) or set(leaves(keys)) & set(leaves(c.summed)):
        return False
    return min(level(context, c.left.value), level(context, c.right.value)) >= Level.COMPUTED


def has_rows(c: Contraction, keys: Dim, kept: list[Axis]) -> bool:
    """Whether the rows of a product, if it has such, are among the axes that are kept."""
    left, right = set(c.left.axes), set(c.right.axes)
    if c.left.over(keys) and c.right.over(keys):
        rows = left ^ right
    else:
        rows = right - left if c.left.over(keys) else left - right
    return not rows or bool(rows & set(leaves(kept)))


def is_softmax(value: Value) -> bool:
    """Whether an operand is a softmax as it is: its product is a weighted sum, not scores."""
    while is_view(value) or is_cast(value) or value.op is aten.dropout.default:
        value = value.args[0]
    return value.op is aten.softmax.int


def along_dimensions(reader: ScoresReader, x: Operand) -> bool:
    """Whether an operation along some dimensions has scores for an operand.

    What it takes from a dimension is another axis, which may be the keys'. The largest of scores along other axes are
    scores, too, as BiDAF's context looks at the query.
    """
    value, rows = x.value, reader.shared.rows
    if value.op in LARGEST:
        layout, dims = before_reduction(value, x.layout)
        rows.extend(axis for i in dims for axis in layout[i])
        return reader.holds(Operand(value.args[0], layout))
    mine = set(leaves(reader.keys))
    for source in arguments(value):
        if source.fake is None or len(source.shape) != len(x.layout) or not source.dtype.is_floating_point:
            continue
        new, over = [], reader.keys
        for i, (dim, a, b) in enumerate(zip(x.layout, source.shape, value.shape, strict=True)):
            channels = i == 1 and value.op is aten.convolution.default
            if known(a == b) and not channels:
                new.append(dim)
                continue
            if channels and set(leaves(dim)) & mine:
                return False
            axis = () if known(a == 1) else (Axis(a),)
            over = axis if set(leaves(dim)) & mine else over
            if not channels and set(leaves(dim)) & set(leaves(rows)):
                rows.extend(axis)
            new.append(axis)
        inner = reader if over is reader.keys else reader.with_keys(over)
        if inner.holds(Operand(source, tuple(new))):
            return True
    return False
