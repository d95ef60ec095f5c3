"""Dense float64 attention with a SUS backward for given multipliers m (paper, section 3; docs/estimator.md).

It shares nothing with the other implementations, not even the masks: it defines what is correct.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dense:
    """Arguments as `fx_passes.ops.problem` names them; every tensor optional but query, key and value."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    sinks: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    prefix: Tensor | None = None
    scale: float | None = None
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    softcap: float = 0.0

    def visible(self) -> Tensor:
        """Bool [B, H, M, N]."""
        b, h, m, _ = self.query.shape
        n = self.key.shape[2]
        seen = torch.ones(b, h, m, n, dtype=torch.bool, device=self.query.device)
        i = torch.arange(m, device=seen.device)[:, None] + (n - m if self.bottom_right else 0)
        j = torch.arange(n, device=seen.device)[None, :]
        if self.left is not None:
            seen = seen & (j >= i - self.left)
        if self.right is not None:
            seen = seen & (j <= i + self.right)
        if self.prefix is not None:
            seen = seen | (j < self.prefix[:, None, None, None])
        if self.query_ids is not None and self.key_ids is not None:
            seen = seen & (self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :])
        if self.attn_mask is not None:
            seen = seen & self.attn_mask
        return seen

    def logits(self) -> Tensor:
        """S [B, H, M, N] in float64, differentiable, -inf where masked."""
        key = self.key.double().repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = scale * (self.query.double() @ key.mT)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.attn_bias is not None:
            logits = logits + self.attn_bias.double()
        return logits.masked_fill(~self.visible(), -torch.inf)

    def weights(self, logits: Tensor) -> Tensor:
        """W [B, H, M, N]; rows that see nothing are zero."""
        if self.sinks is not None:
            sink = self.sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)
            return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1]
        empty = (logits == -torch.inf).all(-1, keepdim=True)
        return torch.softmax(logits.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)


def dense_attention(problem: Dense, dropout: Tensor | None = None) -> Tensor:
    """Out [B, H, M, E] in float64, with autograd's exact backward. `dropout` is a factor on W, [B, H, M, N]."""
    weights = problem.weights(problem.logits())
    value = problem.value.double().repeat_interleave(problem.query.shape[1] // problem.key.shape[1], 1)
    return (weights if dropout is None else weights * dropout.double()) @ value


def sus_gradients(problem: Dense, grad: Tensor, multiplier: Tensor, dropout: Tensor | None = None) -> dict[str, Tensor]:
    """Gradients of the float tensors of a problem, with every explicit W_ij replaced by ``W_ij * multiplier_ij``.

    Args:
        problem: the call.
        grad: dO [B, H, M, E].
        multiplier: m [B, H, M, N], 1 / q where an entry is kept, else 0.
        dropout: factor on W, [B, H, M, N].
    """
    inputs = {
        name: x.detach().requires_grad_()
        for name in ("query", "key", "attn_bias")
        if (x := getattr(problem, name)) is not None
    }
    logits = replace(problem, **inputs).logits()
    weights = problem.weights(logits.detach())
    factor = torch.ones_like(weights) if dropout is None else dropout.double()
    groups, grad = problem.key.shape[1], grad.double()
    value = problem.value.double().repeat_interleave(problem.query.shape[1] // groups, 1)
    out = (weights * factor) @ value
    delta = (grad * out).sum(-1, keepdim=True)
    kept = weights * multiplier.double()
    grad_logits = kept * (factor * (grad @ value.mT) - delta)
    gradients = dict(zip(inputs, torch.autograd.grad(logits, list(inputs.values()), grad_logits), strict=True))
    per_head = (kept * factor).mT @ grad
    gradients["value"] = per_head.reshape(per_head.shape[0], groups, -1, *per_head.shape[2:]).sum(2)
    if problem.sinks is not None:
        gradients["sinks"] = -((1 - weights.sum(-1, keepdim=True)) * delta).sum((0, 2, 3))
    return gradients
