"""Operations that are recorded as the smaller ones they are made of, so that fewer have to be understood."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _baddbmm(input: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    product = aten.bmm.default(a, b) if a.dim() == 3 else aten.mm.default(a, b)
    product = product if alpha == 1 else aten.mul.Tensor(product, alpha)
    if beta == 0:
        return product  # type: ignore[no-any-return]
    return aten.add.Tensor(product, input if beta == 1 else aten.mul.Tensor(input, beta))  # type: ignore[no-any-return]


def sets_by_mask(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> bool:
    """Whether ``x[..., mask] = number`` is all that an index_put does."""
    masks = [i for i in indices if i is not None]
    return not accumulate and len(masks) == 1 and masks[0].dtype == torch.bool and not values.dim()


def masked_by_index(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Tensor:
    mask = next(i for i in indices if i is not None)
    for _ in range(x.dim() - [i is not None for i in indices].index(True) - mask.dim()):
        mask = aten.unsqueeze.default(mask, -1)
    return aten.masked_fill.Tensor(x, mask, values)  # type: ignore[no-any-return]


def _index_put(x: Tensor, indices: Any, values: Tensor, accumulate: bool = False) -> Any:
    if not sets_by_mask(x, indices, values, accumulate):
        return NotImplemented
    return masked_by_index(x, indices, values)


def _stack(tensors: Any, dim: int = 0) -> Tensor:
    dim %= tensors[0].dim() + 1
    return aten.cat.default([aten.unsqueeze.default(t, dim) for t in tensors], dim)  # type: ignore[no-any-return]


def _split(x: Tensor, sizes: Any, dim: int = 0) -> Any:
    total = x.shape[dim]
    sizes = list(sizes) if isinstance(sizes, (list, tuple)) else [sizes] * -(-total // sizes)
    if not all(isinstance(n, int) for n in (total, *sizes)):
        return NotImplemented
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [aten.slice.Tensor(x, dim, end - n, min(end, total)) for n, end in zip(sizes, ends, strict=True)]


def _unbind(x: Tensor, dim: int = 0) -> Any:
    if not isinstance(x.shape[dim], int):
        return NotImplemented
    return [aten.select.int(x, dim, i) for i in range(x.shape[dim])]


def _full(x: Tensor, size: Any, number: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """What `new_full`, `zeros_like` and the like hold does not depend on the tensor that they are like."""
    return aten.full.default(size, number, dtype=dtype or x.dtype, device=device or x.device)  # type: ignore[no-any-return]


def _exp2(x: Tensor) -> Tensor:
    return aten.exp.default(aten.mul.Tensor(x, math.log(2)))  # type: ignore[no-any-return]


def _tril(x: Tensor, diagonal: int = 0) -> Any:
    if not x.is_floating_point():
        return NotImplemented
    seen = aten.tril.default(aten.ones.default(x.shape[-2:], dtype=torch.bool, device=x.device), diagonal)
    return aten.masked_fill.Scalar(x, aten.logical_not.default(seen), 0)


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return aten.softmax.int(x, dim, torch.float32 if half_to_float else None)  # type: ignore[no-any-return]


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Tensor:
    return aten.log_softmax.int(x, dim, torch.float32 if half_to_float else None)  # type: ignore[no-any-return]


def _convolution(x: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any, *rest: Any) -> Any:
    """A convolution over single positions is a product over channels, as talking heads have it."""
    transposed, _, groups = rest
    if transposed or groups != 1 or any(n != 1 for n in (*weight.shape[2:], *stride)) or any(padding):
        return NotImplemented
    flat = aten.reshape.default(x, [*x.shape[:2], -1])
    kernel = aten.expand.default(aten.view.default(weight, weight.shape[:2]), [x.shape[0], -1, -1])
    out = aten.view.default(aten.bmm.default(kernel, flat), [x.shape[0], weight.shape[0], *x.shape[2:]])
    if bias is None:
        return out
    return aten.add.Tensor(out, aten.view.default(bias, [-1] + [1] * (x.dim() - 2)))


def _mv(a: Tensor, b: Tensor) -> Tensor:
    return aten.squeeze.dim(aten.mm.default(a, aten.unsqueeze.default(b, -1)), -1)  # type: ignore[no-any-return]


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.baddbmm.default: _baddbmm,
    aten.addmm.default: _baddbmm,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: lambda x, dim, dtype=None: aten.softmax.int(x, dim, dtype),
    aten._log_softmax.default: _log_softmax,
    aten.mv.default: _mv,
    aten.convolution.default: _convolution,
    aten.index_put.default: _index_put,
    aten.stack.default: _stack,
    aten.tril.default: _tril,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.zeros_like.default: lambda x, **options: _full(x, x.shape, 0, **options),
    aten.ones_like.default: lambda x, **options: _full(x, x.shape, 1, **options),
    aten.full_like.default: lambda x, number, **options: _full(x, x.shape, number, **options),
    aten.new_zeros.default: lambda x, size, **options: _full(x, size, 0, **options),
    aten.new_ones.default: lambda x, size, **options: _full(x, size, 1, **options),
    aten.new_full.default: _full,
    aten.exp2.default: _exp2,
    aten.rsub.Scalar: lambda x, other, alpha=1: aten.add.Tensor(
        aten.neg.default(x if alpha == 1 else x * alpha), other
    ),
    aten.rsub.Tensor: lambda x, other, *, alpha=1: aten.sub.Tensor(other, x, alpha=alpha),
}
