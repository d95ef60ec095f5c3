"""PyTorch's flash attention kernel for the CPU: where it applies, a run with SUS keeps the forward's bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from fx_passes.ops.problem import Gradients, Problem, Softmax
from fx_passes.ops.tiled.tiles import dense_entries, row_blocks, row_softmax
from fx_passes.torch_compat import CPU_KERNEL_HAS_GQA

# Above it, float32 has fewer than 13 bits for the part of a logsumexp that decides the weights.
_LARGE = 1024.0


def library_applies(problem: Problem) -> bool:
    """Whether PyTorch's flash kernel for the CPU computes this problem, and so keeps the bits of a run without SUS."""
    q, s = problem.query, problem.static
    band = (s.left is None and s.right is None) or (s.left is None and s.right == 0 and problem.diagonal == 0)
    plain = problem.sinks is None and problem.query_ids is None and problem.prefix is None
    plain = plain and s.softcap == 0 and s.dropout_p == 0
    sizes = q.shape[-1] == problem.value.shape[-1] and q.numel() > 0 and problem.key.numel() > 0
    # The kernel multiplies the causal mask's -inf by the scale, in float32: a NaN for what is zero there or below.
    scale = s.right is None or s.scale > 1e-30
    heads = q.shape[1] == problem.key.shape[1] or CPU_KERNEL_HAS_GQA
    return q.device.type == "cpu" and band and plain and sizes and scale and heads


def eager_takes_library(problem: Problem) -> bool:
    """Whether F.scaled_dot_product_attention computes this problem by that kernel: the formula's NaNs lie elsewhere."""
    if not library_applies(problem):
        return False
    mask = problem.attn_mask if problem.attn_bias is None else problem.attn_bias
    tensors, s = (problem.query, problem.key, problem.value, mask), problem.static
    choice = torch._fused_sdp_choice(*tensors, 0.0, s.right == 0, scale=s.scale, enable_gqa=True)
    return choice == SDPBackend.FLASH_ATTENTION.value


def _mask(problem: Problem) -> Tensor | None:
    """Mask and bias as the one float tensor that the library's kernel takes; a broadcast one stays small."""
    mask, bias = problem.attn_mask, problem.attn_bias
    if mask is None:
        return None if bias is None else bias.to(problem.query.dtype)
    zero = torch.zeros((), dtype=problem.query.dtype, device=mask.device)
    return torch.where(mask, zero if bias is None else bias.to(problem.query.dtype), -torch.inf)


def _inputs(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with unit stride in the last dimension, which the kernel takes for granted."""
    q, k, v = problem.query, problem.key, problem.value
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # type: ignore[return-value]


def library_forward(problem: Problem, exact: bool = True) -> tuple[Tensor, Softmax]:
    """Out and softmax; unless `exact`, the softmax has the library's own logsumexp, however much is rounded off."""
    s = problem.static
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *_inputs(problem), 0.0, s.right == 0, attn_mask=_mask(problem), scale=s.scale
    )
    softmax = Softmax(lse.contiguous(), torch.ones_like(lse, memory_format=torch.contiguous_format))
    return out, sharpen(problem, softmax) if exact else softmax


def sharpen(problem: Problem, softmax: Softmax) -> Softmax:
    """With rows of large logits formed again, so that they fit the logits that `tiles` gives, to the bit."""
    large = softmax.maximum.abs() > _LARGE
    if not large.any():
        return softmax
    softmax = Softmax(softmax.maximum.clone(), softmax.total.clone())
    for rows in row_blocks(problem):
        if large[:, :, rows].any():
            softmax.maximum[:, :, rows], softmax.total[:, :, rows] = row_softmax(problem, rows)
    return softmax


def library_backward_applies(problem: Problem, softmax: Softmax) -> bool:
    """Whether the kernel's own backward gives the exact gradients: its logsumexp must not have lost log(total)."""
    return library_applies(problem) and bool((softmax.maximum.abs() <= _LARGE).all())


def library_backward(problem: Problem, grad: Tensor, out: Tensor, softmax: Softmax) -> tuple[Gradients, int]:
    """Exact gradients of query, key and value, and the number of entries used."""
    s = problem.static
    lse = softmax.maximum + softmax.total.log()
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *_inputs(problem), out, lse, 0.0, s.right == 0, attn_mask=_mask(problem), scale=s.scale
    )
    query, key, value = (g.contiguous() for g in grads)
    return Gradients(query, key, value, None, None), dense_entries(problem)
