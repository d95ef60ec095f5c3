"""Attention in plain PyTorch operations, dense and exact: differentiable in both modes, any number of times.

For what an operator with a backward of its own cannot give: tangents, gradients of gradients, torch.func's transforms,
and tensors without data.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float = 1.0,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Out [B, H, M, E] in the query's dtype, with `return_lse` also the logsumexp [B, H, M], as `attend` gives it.

    Arguments as in `Problem` and `Static`; memory for [B, H, M, N].
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // max(key.shape[1], 1)
    key, value = (x.to(dtype).repeat_interleave(group, 1) if group > 1 else x.to(dtype) for x in (key, value))
    logits = (query.to(dtype) @ key.mT) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if attn_bias is not None:
        logits = logits + attn_bias
    band = _visible(logits, query_ids, key_ids, prefix, left, right, bottom_right)
    for seen in (band, attn_mask):
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[None, :, None, None].expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    blind = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(blind, 0.0)
    weights = torch.softmax(logits, -1).masked_fill(blind, 0.0)[..., : value.shape[-2]]
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    out = (weights @ value).to(query.dtype)
    return (out, torch.logsumexp(logits, -1).masked_fill(blind[..., 0], 0.0)) if return_lse else out


def _visible(
    logits: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    prefix: Tensor | None,
    left: int | None,
    right: int | None,
    bottom_right: bool,
) -> Tensor | None:
    """Bool, broadcastable to [B, H, M, N]; None where every query sees every key."""
    m, n = logits.shape[-2:]
    keys = torch.arange(n, device=logits.device)
    places = keys - torch.arange(m, device=logits.device)[:, None] - (n - m if bottom_right else 0)
    seen: Tensor | None = None
    if left is not None:
        seen = places >= -left
    if right is not None:
        seen = places <= right if seen is None else seen & (places <= right)
    if seen is not None and prefix is not None:
        seen = seen | (keys < prefix[:, None, None, None])
    if query_ids is not None and key_ids is not None:
        same = query_ids[:, None, :, None] == key_ids[:, None, None, :]
        seen = same if seen is None else seen & same
    return seen
