"""Groups of ATen operators that mean the same to the pass. `rules.py` says what a group means for scores and probs."""

from __future__ import annotations

import torch

from fx_passes.find.trace import Value, partly_written

aten = torch.ops.aten

# Layouts: `views.py` says how the axes move.
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten._reshape_alias.default}
SQUEEZES = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}
COPIES = {
    aten.clone.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    aten.contiguous.default,
}  # fmt: skip
MOVES = {
    aten.unsqueeze.default, aten.expand.default, aten.repeat.default, aten.permute.default, aten.transpose.int,
    aten.t.default,
}  # fmt: skip
CASTS = {aten._to_copy.default}

# Arithmetic.
MATMULS = {aten.bmm.default, aten.mm.default}
SUMS = {aten.add.Tensor, aten.sub.Tensor}
PRODUCTS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}
DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
LARGEST = {aten.amax.default, aten.max.dim}
CLAMPS_BELOW = {aten.clamp_min.default, aten.clamp.default}

# Conditions.
FILLS = {
    aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf,
}  # fmt: skip
ANDS = {aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Tensor}
ORS = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}
NOTS = {aten.bitwise_not.default, aten.logical_not.default}

# What mixes, cuts or joins along some dimensions and keeps the others: what it makes of scores is scores (tier 2).
ALONG_DIMENSIONS = {
    aten.log_softmax.int, aten.tril.default, aten.triu.default, aten.cumsum.default, aten.flip.default,
    aten.convolution.default, aten.scatter.src, aten.scatter.value, aten.scatter_add.default,
    aten.index_put.default, aten.masked_scatter.default, aten.native_layer_norm.default,
    aten.native_batch_norm.default, aten.native_group_norm.default, aten.index_select.default, aten.index.Tensor,
    aten.slice_scatter.default, aten.select_scatter.default, aten.constant_pad_nd.default, aten.cat.default,
    aten.roll.default, aten.gather.default, aten.topk.default, aten.sort.default,
}  # fmt: skip
_ELEMENTWISE = {aten.masked_fill.Tensor, aten.dropout.default, aten.hardswish.default, aten.where.ScalarOther}


def is_elementwise(value: Value) -> bool:
    """Whether each element of a value depends on the same element of its operands; some are not tagged so."""
    return torch.Tag.pointwise in getattr(value.op, "tags", ()) or value.op in _ELEMENTWISE


def name(value: Value) -> str:
    """An operation as the report calls it."""
    if value.op is partly_written:
        return "a write in place"
    if value.op is None:
        return "an unknown operation"
    return str(getattr(value.op, "overloadpacket", value.op)).removeprefix("aten.")
