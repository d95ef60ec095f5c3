"""PyTorch's own attention kernels: for `forward="library"`, which keeps their bits, and for the exact backward."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fx_passes.ops.problem import Gradients, Problem


def applies(problem: Problem) -> bool:
    """Whether F.scaled_dot_product_attention computes this problem."""
    s = problem.static
    band = (s.left is None and s.right is None) or (s.left is None and s.right == 0 and problem.diagonal == 0)
    masked = problem.attn_mask is not None or problem.attn_bias is not None
    plain = problem.sinks is None and problem.query_ids is None and problem.prefix is None
    return band and plain and not (masked and s.right == 0) and s.softcap == 0 and s.dropout_p == 0


def forward(problem: Problem) -> Tensor:
    s, mask, bias = problem.static, problem.attn_mask, problem.attn_bias
    if mask is not None and bias is not None:
        mask = torch.where(mask, bias.to(problem.query.dtype), -torch.inf)
    elif bias is not None:
        mask = bias.to(problem.query.dtype)
    out: Tensor = scaled_dot_product_attention(
        problem.query,
        problem.key,
        problem.value,
        attn_mask=mask,
        is_causal=s.right == 0,
        scale=s.scale,
        enable_gqa=problem.group > 1,
    )
    # The operator's layout (`schema.attention`); the library's depends on which of its kernels ran.
    return out if out.transpose(1, 2).is_contiguous() else out.transpose(1, 2).contiguous().transpose(1, 2)


def backward(problem: Problem, grad: Tensor) -> Gradients:
    """Exact gradients of query, key and value; it runs the library's forward again, for what its backward needs."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (problem.query, problem.key, problem.value)]
        query, key, value = inputs
        out = forward(replace(problem, query=query, key=key, value=value))
    grads = [g.contiguous() for g in torch.autograd.grad(out, inputs, grad)]
    return Gradients(grads[0], grads[1], grads[2], None, None)
