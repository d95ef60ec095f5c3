"""In which order a tensor has its dimensions in memory. Who replaces a tensor keeps it, since views depend on it."""

from __future__ import annotations

import torch
from torch import Tensor


def in_order(x: Tensor, order: list[int], copy: bool) -> Tensor:
    """x with its dimensions in this order in memory, from the slowest to the fastest; `copy`: a tensor of its own."""
    moved = x.permute(order)
    moved = moved.clone(memory_format=torch.contiguous_format) if copy else moved.contiguous()
    return moved.permute([order.index(dim) for dim in range(len(order))])


def order_in_memory(x: Tensor) -> list[int] | None:
    """The dimensions from the slowest to the fastest; None where they overlap in memory."""
    sizes, strides = ([_hint(n) for n in numbers] for numbers in (x.shape, x.stride()))
    if None in (*sizes, *strides) or any(not stride and size != 1 for size, stride in zip(sizes, strides, strict=True)):
        return None
    return sorted(range(x.dim()), key=lambda dim: -(strides[dim] or 0))


def _hint(x: int | torch.SymInt) -> int | None:
    return x if isinstance(x, int) else x.node.hint
