"""Operands as they are now, for a backward that runs when the caller may have written into them.

F.scaled_dot_product_attention makes a float tensor of a bool mask and keeps that; attention written by hand keeps no
mask that is added. Who trains with them may change a mask before the backward runs, and so may who trains with SUS.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from fx_passes.ops.layout import in_order, order_in_memory
from fx_passes.ops.transforms import transform

# Layers get one mask, and have one copy of it together. A few kinds of masks may take turns.
_copies: deque[weakref.ref[Tensor]] = deque(maxlen=4)


@torch.library.custom_op("sus::snapshot", mutates_args=())
def _snapshot(x: Tensor) -> Tensor:
    return _compact(x).clone()


@_snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(_compact(x))


def snapshot(x: Tensor) -> Tensor:
    """A tensor with the values of now that nobody writes to; what wants a gradient is returned as it is."""
    if x.requires_grad:
        return x
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() or type(x) is not Tensor:
        copy: Tensor = _snapshot(x)  # an operator, so that no partitioner computes it again in the backward
        return copy.expand(x.shape)
    return _shared(x)


def as_library_keeps(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor, Tensor, Tensor | None, bool, bool]:
    """Query, key and mask of a call that wants a gradient, whether the mask must stay as it is, and the result too.

    Where F.scaled_dot_product_attention has a kernel, that keeps all three (of a bool mask a float copy). Where it has
    none, products of them are kept, so that all three may be written to: then they are copies. So may the result.
    """
    if torch.compiler.is_dynamo_compiling() or transform(query, key, value, attn_mask) is not None:
        return query, key, attn_mask, False, True
    if not query.dtype == key.dtype == value.dtype:  # autocast makes copies
        return query, key, attn_mask, False, True
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    mask = query.new_zeros(()).expand(attn_mask.shape) if is_bool and attn_mask is not None else attn_mask
    try:
        kernel = torch._fused_sdp_choice(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except RuntimeError:  # the caller allows none that would take it
        kernel = 1
    if kernel:
        return query, key, attn_mask, attn_mask is not None and not is_bool, True
    if attn_mask is not None and attn_mask.requires_grad:
        attn_mask = attn_mask.clone()
    return query.clone(), key.clone(), attn_mask, False, False


def as_library_returns(out: Tensor, query: Tensor, kept: bool) -> Tensor:
    """The result in the memory layout of the library's: its kernels, which keep it, have the query's."""
    order = order_in_memory(query) if kept else list(range(out.dim()))
    return out if order is None or len(order) != out.dim() else in_order(out, order, not kept)


def _shared(x: Tensor) -> Tensor:
    """A copy, or one made earlier of the same values: by value, for not all writes raise a tensor's version."""
    small = _compact(x)
    if small.device.type == "cpu":  # elsewhere a comparison waits for the device
        for known in list(_copies):
            copy = known()
            if (
                copy is not None
                and copy.dtype == small.dtype
                and copy.shape == small.shape
                and torch.equal(copy, small)
            ):
                return copy.expand(x.shape)
    copy = small.clone()
    _copies.append(weakref.ref(copy))
    return copy.expand(x.shape)


def _compact(x: Tensor) -> Tensor:
    """With 1 in place of the sizes along which all is the same."""
    for dim, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[dim] > 1:
            x = x.narrow(dim, 0, 1)
    return x
