"""Stand-ins for flash-attn 2, 3, 4 and xformers: functions of the same names and signatures that compute on a CPU.

The real packages need a GPU. What is computed follows their documentation: [B, N, H, D], bands from the bottom right
corner, -1 or None for no bound, documents by the ends of their sequences.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _one(q, k, v, scale, left, right, softcap=0.0, slopes=None, sinks=None, dropout=0.0, bias=None):
    """[H, M, D], [G, N, D] to [H, M, E], counted from the bottom right corner."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    m, n = q.shape[1], k.shape[1]
    distance = torch.arange(n) - torch.arange(n - m, n)[:, None]
    if slopes is not None:
        s = s - slopes.view(-1, 1, 1).to(s.dtype) * distance.abs()
    if bias is not None:
        s = s + bias
    hidden = torch.zeros(m, n, dtype=torch.bool)
    if right is not None:
        hidden |= distance > right
    if left is not None:
        hidden |= -distance > left
    s = s.masked_fill(hidden, -math.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.to(s.dtype).view(-1, 1, 1).expand(-1, m, 1)], -1)
    w = torch.nan_to_num(s.softmax(-1))[..., :n]
    return torch.nn.functional.dropout(w, dropout) @ v


def _bounds(causal, window):
    left, right = (None if x is None or x < 0 else x for x in window)
    return left, (0 if causal else right)


def batched(q, k, v, scale, causal, window, softcap=0.0, slopes=None, sinks=None, dropout=0.0):
    """[B, N, H, D]"""
    left, right = _bounds(causal, window)
    rows = []
    for i in range(q.shape[0]):
        mine = slopes if slopes is None or slopes.dim() == 1 else slopes[i]
        parts = (x[i].transpose(0, 1) for x in (q, k, v))
        rows.append(_one(*parts, scale, left, right, softcap, mine, sinks, dropout).transpose(0, 1))
    return torch.stack(rows)


def packed(q, k, v, cu_q, cu_k, scale, causal, window, softcap=0.0, slopes=None, sinks=None, dropout=0.0):
    """[T, H, D]"""
    left, right = _bounds(causal, window)
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    out = []
    for a, b, c, d in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        parts = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        out.append(_one(*parts, scale, left, right, softcap, slopes, sinks, dropout).transpose(0, 1))
    return torch.cat(out)


def _flash_attn_2() -> dict[str, Any]:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return batched(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout=dropout_p)

    def flash_attn_qkvpacked_func(
        qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return batched(*qkv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes, dropout=dropout_p)

    def flash_attn_kvpacked_func(
        q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        return batched(q, *kv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes, dropout=dropout_p)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        more = (softmax_scale, causal, window_size, softcap, alibi_slopes)
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, *more, dropout=dropout_p)

    def flash_attn_varlen_qkvpacked_func(
        qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1),
        softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        more = (softmax_scale, causal, window_size, softcap, alibi_slopes)
        return packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, *more, dropout=dropout_p)

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, causal=False, **_):
        return batched(q, k_cache, v_cache, None, causal, (-1, -1))

    return locals()


def _flash_attn_3() -> dict[str, Any]:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        out = batched(q, k, v, softmax_scale, causal, window_size, softcap)
        return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)

    return locals()


def _flash_attn_4() -> dict[str, Any]:
    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        out = batched(q, k, v, softmax_scale, causal, window_size, softcap, sinks=learnable_sink)
        return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    return locals()


@dataclass
class _SeqLenInfo:
    seqstart: Tensor


class LowerTriangularMask:
    """xformers' causal mask, from the top left corner."""


class LowerTriangularFromBottomRightMask:
    """xformers' causal mask, from the bottom right corner."""


@dataclass
class BlockDiagonalMask:
    """xformers' mask of packed sequences."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> Any:
        info = _SeqLenInfo(torch.tensor([0, *lengths]).cumsum(0).int())
        return cls(info, info)


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """The same, causal in each sequence."""


def _xformers() -> dict[str, Any]:
    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        if isinstance(attn_bias, BlockDiagonalMask):
            causal = isinstance(attn_bias, BlockDiagonalCausalMask)
            ends = attn_bias.q_seqinfo.seqstart, attn_bias.k_seqinfo.seqstart
            return packed(query[0], key[0], value[0], *ends, scale, causal, (-1, -1), dropout=p)[None]
        right = None
        if isinstance(attn_bias, (LowerTriangularMask, LowerTriangularFromBottomRightMask)):
            right = 0 if isinstance(attn_bias, LowerTriangularFromBottomRightMask) else query.shape[1] - key.shape[1]
            attn_bias = None
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        biases = [None] * len(q) if attn_bias is None else attn_bias
        out = [_one(q[i], k[i], v[i], scale, None, right, bias=biases[i], dropout=p) for i in range(len(q))]
        return torch.stack(out).transpose(1, 2)

    return locals()


def _module(name: str, functions: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    for key, function in functions.items():
        if callable(function):
            function.__module__ = name
            setattr(module, key, function)
    return module


@contextmanager
def installed() -> Iterator[None]:
    """The packages are loaded, as if they had been imported."""
    modules = {
        "flash_attn": _module("flash_attn", _flash_attn_2()),
        "flash_attn_interface": _module("flash_attn_interface", _flash_attn_3()),
        "flash_attn.cute": _module("flash_attn.cute", _flash_attn_4()),
        "xformers": ModuleType("xformers"),
        "xformers.ops": _module("xformers.ops", _xformers()),
    }
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
