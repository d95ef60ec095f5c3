"""PyTorch's own attention kernels: the forward's bits and its logsumexp, and the exact backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad, scaled_dot_product_attention

from fx_passes.ops.problem import Gradients, Problem, in_layout

_FLASH, _EFFICIENT, _CUDNN = (
    int(kernel.value)
    for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
)
_KERNELS = {
    _FLASH: torch.ops.aten._scaled_dot_product_flash_attention,
    _EFFICIENT: torch.ops.aten._scaled_dot_product_efficient_attention,
    _CUDNN: torch.ops.aten._scaled_dot_product_cudnn_attention,
}


def applies(problem: Problem) -> bool:
    """Whether F.scaled_dot_product_attention computes this problem."""
    s = problem.static
    band = (s.left is None and s.right is None) or (s.left is None and s.right == 0 and problem.diagonal == 0)
    masked = problem.attn_mask is not None or problem.attn_bias is not None
    plain = problem.sinks is None and problem.query_ids is None and problem.prefix is None
    return band and plain and not (masked and s.right == 0) and s.softcap == 0 and s.dropout_p == 0


def _mask(problem: Problem) -> Tensor | None:
    mask, bias = problem.attn_mask, problem.attn_bias
    if mask is not None and bias is not None:
        return torch.where(mask, bias.to(problem.query.dtype), -torch.inf)
    return mask if bias is None else bias.to(problem.query.dtype)


def forward(problem: Problem) -> Tensor:
    s = problem.static
    out: Tensor = scaled_dot_product_attention(
        problem.query,
        problem.key,
        problem.value,
        attn_mask=_mask(problem),
        is_causal=s.right == 0,
        scale=s.scale,
        enable_gqa=problem.group > 1,
    )
    return in_layout(out)


def kernel_of(problem: Problem) -> int:
    """The number of the kernel that F.scaled_dot_product_attention takes for a call, 0 where none gives a logsumexp.

    A float bias is left out: in a row whose logits are all -1e9 a logsumexp has no room for the sum.
    """
    if not problem.query.is_cuda or problem.attn_bias is not None or not applies(problem):
        return 0
    s = problem.static
    query, key, value = (
        x.detach().requires_grad_(s.sample) for x in (problem.query, problem.key, problem.value)
    )  # some kernels have a forward for more head sizes than their backward has
    kernel = torch._fused_sdp_choice(
        query, key, value, problem.attn_mask, 0.0, s.right == 0, scale=s.scale, enable_gqa=problem.group > 1
    )
    return int(kernel) if kernel in _KERNELS else 0


@dataclass(frozen=True)
class _Inputs:
    """Query, key, value and mask as F.scaled_dot_product_attention hands them to a kernel."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def _inputs(problem: Problem, kernel: int) -> _Inputs:
    q, k, v, mask = problem.query, problem.key, problem.value, problem.attn_mask
    if kernel == _FLASH and q.shape[-1] % 8:
        q, k, v = (_wide(x, 8) for x in (q, k, v))
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        n = k.shape[2]
        if kernel == _EFFICIENT and mask.shape[-1] % 16:  # its rows must be aligned
            mask = _wide(mask, 16)[..., :n]
        mask = mask.expand(*q.shape[:3], n)
    return _Inputs(q, k, v, mask)


def _laid_out_as(query: Tensor, x: Tensor) -> Tensor:
    """With its dimensions in the query's order in memory. cuDNN's plans are cached by the query's strides alone."""
    order = sorted(range(4), key=query.stride, reverse=True)
    back = sorted(range(4), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def _wide(x: Tensor, multiple: int) -> Tensor:
    return pad(x, (0, -x.shape[-1] % multiple))


def forward_with_lse(problem: Problem, kernel: int) -> tuple[Tensor, Tensor]:
    """Out, in the bits of F.scaled_dot_product_attention, and the logsumexp float32 [B, H, M]."""
    x, causal, scale = _inputs(problem, kernel), problem.static.right == 0, problem.static.scale
    (b, h, m, _), e = problem.query.shape, problem.value.shape[-1]
    if kernel == _FLASH:
        out, lse, *_ = _KERNELS[kernel](x.query, x.key, x.value, 0.0, causal, False, scale=scale)
    elif kernel == _EFFICIENT:
        out, lse, *_ = _KERNELS[kernel](x.query, x.key, x.value, x.mask, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = _KERNELS[kernel](x.query, x.key, x.value, x.mask, True, 0.0, causal, False, scale=scale)
    # Flash pads the head size, the memory-efficient kernel the rows of the logsumexp; cuDNN's has one dimension more.
    return in_layout(out[..., :e]), lse.reshape(b, h, -1)[..., :m].contiguous()


def exact_backward(problem: Problem, kernel: int, grad: Tensor, out: Tensor, lse: Tensor) -> Gradients:
    """Gradients of query, key and value by the backward of the kernel that made `out`, in its bits."""
    x, causal, scale = _inputs(problem, kernel), problem.static.right == 0, problem.static.scale
    (d, e), (m, n) = (problem.query.shape[-1], problem.value.shape[-1]), (problem.query.shape[2], problem.key.shape[2])
    none = torch.zeros((), dtype=torch.int64, device=grad.device)  # state of a dropout that there is not
    found: Any
    if kernel == _FLASH:
        grad, out = (_wide(y, 8) for y in (grad, out))
        state = torch.zeros(2, dtype=torch.uint64, device=grad.device)
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, x.query, x.key, x.value, out, lse, None, None, m, n, 0.0, causal, state, none, scale=scale
        )
    elif kernel == _EFFICIENT:
        lse = _wide(lse, 32)  # as the kernel has it
        found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            grad, x.query, x.key, x.value, x.mask, out, lse, none, none, 0.0, [True, True, True, False], causal,
            scale=scale,
        )  # fmt: skip
    else:
        grad, out = (_laid_out_as(x.query, y) for y in (grad, out))
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, x.query, x.key, x.value, out, lse[..., None], none, none, x.mask, None, None, m, n, 0.0, causal,
            scale=scale,
        )  # fmt: skip
    query, key, value = (g[..., :w].contiguous() for g, w in zip(found[:3], (d, d, e), strict=True))
    return Gradients(query, key, value, None, None)
