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
    """flash_attn 2.8."""

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

    def flash_attn_varlen_kvpacked_func(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False,
    ):  # fmt: skip
        more = (softmax_scale, causal, window_size, softcap, alibi_slopes)
        return packed(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, *more, dropout=dropout_p)

    def flash_attn_with_kvcache(
        q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
    ):  # fmt: skip
        return batched(q, k_cache, v_cache, softmax_scale, causal, window_size, softcap, alibi_slopes)

    return locals()


def _flash_attn_3() -> dict[str, Any]:
    """flash_attn_interface since August 2025: the output alone."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return batched(q, k, v, softmax_scale, causal, window_size, softcap)

    def flash_attn_qkvpacked_func(
        qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
        attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        parts = qkv.unbind(2)
        if num_heads_q is not None:
            groups = (qkv.shape[2] - num_heads_q) // 2
            parts = qkv.split([num_heads_q, groups, groups], 2)
        return batched(*parts, softmax_scale, causal, window_size, softcap)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap)

    return locals()


class FlashAttnFunc:
    """Where flash-attn 3 had its autograd function: it says whether the logsumexp is returned."""

    @staticmethod
    def forward(q, k, v, softmax_scale, causal, window_size):
        out = batched(q, k, v, softmax_scale, causal, window_size)
        return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1])


def _flash_attn_3_of_2024() -> dict[str, Any]:
    """flash_attn_interface before July 2025: the logsumexp with it. Its last version of that time had it no more."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False, descale_q=None,
        descale_k=None, descale_v=None, gqa_parallel=False,
    ):  # fmt: skip
        return FlashAttnFunc.forward(q, k, v, softmax_scale, causal, window_size)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        window_size=(-1, -1), deterministic=False, seqused_q=None, seqused_k=None, block_table=None,
    ):  # fmt: skip
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size)

    return locals()


def _flash_attn_4() -> dict[str, Any]:
    """flash_attn.cute: always with the logsumexp, [B, H, M] or [H, T], which has a gradient with `return_lse`."""

    def newest(causal, window):
        left, right = window[0], 0 if causal else window[1]
        return (-1, -1) if left is not None and right is not None and left + right < 0 else (left, right)

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        window = newest(causal, window_size)
        out = batched(q, k, v, softmax_scale, causal, window, softcap, sinks=learnable_sink)
        return out, out.new_zeros(q.shape[0], q.shape[2], q.shape[1])

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
        seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
        window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None,
        aux_scalars=None, return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
    ):  # fmt: skip
        window = newest(causal, window_size)
        if cu_seqlens_q is None:
            return batched(q, k, v, softmax_scale, causal, window, softcap, sinks=learnable_sink), None
        ends = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out = packed(q, k, v, *ends, softmax_scale, causal, window, softcap, sinks=learnable_sink)
        return out, out.new_zeros(q.shape[1], q.shape[0])

    return locals()


@dataclass
class _SeqLenInfo:
    seqstart: Tensor

    @classmethod
    def from_seqlens(cls, lengths: list[int]) -> Any:
        return cls(torch.tensor([0, *lengths]).cumsum(0).int())


class LowerTriangularMask:
    """xformers' causal mask, from the top left corner. `visible` is what `materialize` says there."""

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance <= 0


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


class LowerTriangularFromBottomRightMask:
    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance <= shift


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    _window_size: int

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return (distance <= shift) & (distance > shift - self._window_size)


@dataclass
class LocalAttentionFromBottomRightMask:
    window_left: int
    window_right: int

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return (distance <= shift + self.window_right) & (distance >= shift - self.window_left)


@dataclass
class BlockDiagonalMask:
    """xformers' masks of packed sequences."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Any = None

    @classmethod
    def from_seqlens(cls, lengths: list[int], keys: list[int] | None = None) -> Any:
        info = _SeqLenInfo.from_seqlens(lengths)
        return cls(info, info if keys is None else _SeqLenInfo.from_seqlens(keys))

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance == distance


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance <= 0


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance <= shift


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    _window_size: int = 6

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return (distance <= 0) & (distance > -self._window_size)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    _window_size: int = 6

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return (distance <= shift) & (distance > shift - self._window_size)


@dataclass
class PagedBlockDiagonalPaddedKeysMask:
    """Keys in pages of a cache, which this stand-in has not."""

    block_tables: Tensor
    page_size: int = 16

    def visible(self, distance: Tensor, shift: int) -> Tensor:
        return distance == distance


def _xformers() -> dict[str, Any]:
    """xformers.ops since 0.0.32, which hands over to mslk."""

    def masked(q, k, v, scale, mask, bias, p):
        """[H, M, D]"""
        s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        s = s if bias is None else s + bias
        if mask is not None:
            m, n = s.shape[-2:]
            distance = torch.arange(n) - torch.arange(m)[:, None]
            s = s.masked_fill(~mask.visible(distance, n - m), -math.inf)
        return torch.nn.functional.dropout(torch.nan_to_num(s.softmax(-1)), p) @ v

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        q, k, v = (x[:, :, None] if x.dim() == 3 else x.flatten(2, -2) for x in (query, key, value))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        shape = (*query.shape[:-1], value.shape[-1])
        mask = None if isinstance(attn_bias, Tensor) else attn_bias
        if isinstance(attn_bias, BlockDiagonalMask):
            a, b = (x.seqstart.tolist() for x in (attn_bias.q_seqinfo, attn_bias.k_seqinfo))
            ends = zip(a[:-1], a[1:], b[:-1], b[1:], strict=True)
            parts = [(slice(i, j), slice(m, n)) for i, j, m, n in ends]
            out = [masked(q[0, :, i], k[0, :, j], v[0, :, j], scale, mask, None, p) for i, j in parts]
            return torch.cat(out, 1)[None].transpose(1, 2).reshape(shape)
        if isinstance(mask, LowerTriangularMaskWithTensorBias):
            attn_bias = mask._bias
        biases = attn_bias if isinstance(attn_bias, Tensor) else [None] * len(q)
        biases = [x if x is None or x.dim() < 4 else x.flatten(0, 1) for x in biases]
        out = [masked(q[i], k[i], v[i], scale, mask, biases[i], p) for i in range(len(q))]
        return torch.stack(out).transpose(1, 2).reshape(shape)

    return locals()


def _module(name: str, functions: dict[str, Any]) -> ModuleType:
    module = ModuleType(name)
    for key, function in functions.items():
        if callable(function) and key.startswith(("flash", "memory")):
            function.__module__ = name
            setattr(module, key, function)
    return module


@contextmanager
def installed() -> Iterator[None]:
    """The packages are loaded, as if they had been imported."""
    modules = {
        "flash_attn": _module("flash_attn", _flash_attn_2()),
        "flash_attn_interface": _module("flash_attn_interface", _flash_attn_3()),
        "old.flash_attn_interface": _module("old.flash_attn_interface", _flash_attn_3_of_2024()),
        "flash_attn.cute": _module("flash_attn.cute", _flash_attn_4()),
        "mslk.attention.fmha": _module("mslk.attention.fmha", _xformers()),
        "xformers": ModuleType("xformers"),
        "xformers.ops": ModuleType("xformers.ops"),
    }
    shared = modules["mslk.attention.fmha"].memory_efficient_attention
    modules["xformers.ops"].memory_efficient_attention = shared  # type: ignore[attr-defined]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
