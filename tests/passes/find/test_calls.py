"""Attention that is a call already: FlexAttention, flash-attn, torch's varlen_attn, xformers.

Each case is exact at c = inf against the call's own eager form in float64, and sparse at c = 2.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import (
    BlockMask,
    _create_empty_block_mask,
    _identity,
    and_masks,
    create_block_mask,
    flex_attention,
    or_masks,
)

from fx_passes import SUSBackend, explain
from fx_passes.report import Site
from tests.passes.find import attention_packages as packages
from tests.passes.harness import run, tensors
from tests.torch_versions import AuxOutput, AuxRequest, needs_aux, varlen_attn, varlen_options

B, H, N, D = 2, 4, 40, 8
DOCS = torch.arange(N) // 7
DOCS_OF_BATCH = torch.stack([torch.arange(N) // 7, (torch.arange(N) + 3) // 11])
SLOPES, BIAS, SINKS, TABLE = tensors((H,), (B, H, N, N), (H,), (2 * N, H))
ENDS = torch.tensor([0, 5, 20, 21, N], dtype=torch.int32)
OTHER_ENDS = torch.tensor([0, 9, 20, 30, N], dtype=torch.int32)


def eager_flex(q, k, v, score_mod=None, block_mask=None, scale=None, enable_gqa=False, kernel_options=None, **more):
    """FlexAttention's own eager form, which torch gives nobody on a CPU where a gradient is wanted."""
    block_mask = _create_empty_block_mask(q, k) if block_mask is None else block_mask
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse, *top = math_attention(q, k, v, score_mod or _identity, block_mask.as_tuple(), scale, {})
    lse = lse * math.log(2)
    if "return_aux" in more:
        return out, AuxOutput(lse=lse, max_scores=top[0] * math.log(2))
    return (out, lse) if more.get("return_lse") else out


@pytest.fixture(autouse=True, scope="module")
def _packages() -> Iterator[None]:
    with packages.installed():
        yield


def check(f: Callable[..., Any], plain: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> Site:
    """The one site of `f`, whose results and gradients are those of `plain`."""
    outs, grads = run(plain, args)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(f, backend=backend, dynamic=dynamic, fullgraph=True)
    got, got_grads = run(compiled, args)
    for a, b in zip([*got, *got_grads], [*outs, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    backend.c = 2
    got, got_grads = run(compiled, args)
    for a, b in zip(got, outs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    (site,) = backend.report.sites
    moved = any(not torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got_grads, grads, strict=True))
    assert moved == (site.status == "rewritten"), site
    return site


def check_flex(f: Callable[..., Any], *args: Tensor, dynamic: bool = False) -> Site:
    """`check` for ``f(flex_attention, *args)``."""
    return check(partial(f, flex_attention), partial(f, eager_flex), *args, dynamic=dynamic)


def qkv(heads: int = H, keys: int = H, m: int = N, n: int = N, value: int = D) -> tuple[Tensor, ...]:
    return tensors((B, heads, m, D), (B, keys, n, D), (B, keys, n, value))


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return i - j < 5


def near(b, h, i, j):
    return (i - j).abs() <= 3


def prefix(b, h, i, j):
    return j < 6


def documents(b, h, i, j):
    return DOCS[i] == DOCS[j]


def documents_of_batch(b, h, i, j):
    return DOCS_OF_BATCH[b, i] == DOCS_OF_BATCH[b, j]


def real_rows(b, h, i, j):
    return DOCS_OF_BATCH[b, i] > 0


def real_keys(b, h, i, j):
    return DOCS_OF_BATCH[b, j] < 5


def natten(b, h, i, j):
    return ((i // 8 - j // 8).abs() <= 1) & ((i % 8 - j % 8).abs() <= 2)


def dilated(b, h, i, j):
    return ((i - j) % 3 == 0) & (i >= j)


def of_heads(b, h, i, j):
    return (i >= j) & ((h % 2 == 0) | (i - j < 9))


def softcap(s, b, h, i, j):
    return 5 * torch.tanh(s / 5)


def alibi(s, b, h, i, j):
    return s + SLOPES[h] * (j - i)


def relative(s, b, h, i, j):
    return s + TABLE[i - j + N, h]


def full_bias(s, b, h, i, j):
    return s + BIAS[b, h, i, j]


def partly_indexed(s, b, h, i, j):
    return s + BIAS[b][0][i][j]


def softcap_and_alibi(s, b, h, i, j):
    return alibi(softcap(s, b, h, i, j), b, h, i, j)


def scaled(s, b, h, i, j):
    return s * 0.7


def filled(s, b, h, i, j):
    return torch.where(i >= j, s, -float("inf"))


def temperature(s, b, h, i, j):
    return s * (1 + SLOPES[h].abs())


# mask_mod, score_mod, options of the call, what the report says of the mask
FLEX: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "plain": (None, None, {}, "none"),
    "causal": (causal, None, {}, "causal"),
    "sliding window": (and_masks(causal, window), None, {}, "causal, window 5"),
    "window to both sides": (near, None, {}, "up to 3 ahead, window 4"),
    "prefix": (or_masks(prefix, causal), None, {}, "causal, prefix 6"),
    "chunks": (lambda b, h, i, j: (i // 8 == j // 8) & (i >= j), None, {}, "causal, chunk 8"),
    "documents": (and_masks(documents, causal), None, {}, "causal + documents"),
    "documents in a window": (and_masks(causal, window, documents), None, {}, "causal, window 5 + documents"),
    "documents of each entry": (and_masks(causal, documents_of_batch), None, {}, "causal + documents"),
    "documents in chunks": (and_masks(documents, lambda b, h, i, j: i // 8 == j // 8), None, {}, "chunk 8 + documents"),
    "documents twice": (and_masks(documents, documents_of_batch), None, {}, "documents"),
    "documents, multiplied": (lambda b, h, i, j: (i >= j) * (DOCS[i] == DOCS[j]), None, {}, "causal + documents"),
    "documents, not other ones": (lambda b, h, i, j: ~(DOCS[i] != DOCS[j]) & ~(j > i), None, {}, "causal + documents"),
    "documents and padding": (
        and_masks(documents_of_batch, real_rows, real_keys), None, {}, "documents + mask"
    ),
    "rows and keys": (and_masks(real_rows, real_keys), None, {}, "mask"),
    "neighbourhood in two dimensions": (natten, None, {}, "mask"),
    "dilated": (dilated, None, {}, "causal + mask"),
    "mask of heads": (of_heads, None, {}, "causal + mask"),
    "softcap": (causal, softcap, {}, "causal"),
    "alibi": (causal, alibi, {}, "causal + bias"),
    "relative positions": (None, relative, {}, "bias"),
    "bias": (causal, full_bias, {}, "causal + bias"),
    "bias indexed step by step": (None, partly_indexed, {}, "bias"),
    "softcap, then alibi": (causal, softcap_and_alibi, {}, "causal + bias"),
    "score times a number": (causal, scaled, {}, "causal"),
    "score times a number of the head": (causal, temperature, {}, "causal"),
    "mask in score_mod": (None, filled, {}, "causal"),
    "scale": (causal, None, {"scale": 0.3}, "causal"),
    "kernel options": (causal, None, {"kernel_options": {"BLOCK_M": 32}}, "causal"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLEX)
def test_flex(name: str) -> None:
    mask_mod, score_mod, options, mask = FLEX[name]
    block = None if mask_mod is None else create_block_mask(mask_mod, B, H, N, N, device="cpu", BLOCK_SIZE=16)
    site = check_flex(lambda flex, q, k, v: flex(q, k, v, score_mod, block, **options), *qkv())
    assert (site.form, site.status, site.tier, site.mask) == ("flex", "rewritten", 1, mask)


def test_flex_with_fewer_key_heads_and_wider_values() -> None:
    block = create_block_mask(documents_and_causal, None, None, N, N, device="cpu")
    site = check_flex(lambda flex, q, k, v: flex(q, k, v, alibi, block, enable_gqa=True), *qkv(4, 2, value=12))
    assert (site.status, site.mask) == ("rewritten", "causal + documents + bias")


documents_and_causal = and_masks(documents, causal)


def test_flex_with_more_keys_than_queries() -> None:
    def last(b, h, i, j):
        return i + 16 >= j

    block = create_block_mask(last, None, None, N - 16, N, device="cpu")
    site = check_flex(lambda flex, q, k, v: flex(q, k, v, None, block), *qkv(m=N - 16))
    assert site.mask == "up to 16 ahead"


def test_flex_with_a_learned_bias() -> None:
    def f(flex: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return flex(q, k, v, lambda s, b, h, i, j: s + table[h, (i - j).clamp(0, 9)])

    assert check_flex(f, *qkv(), *tensors((H, 10))).mask == "bias"


# -- flash-attn and xformers: stand-ins of the same signatures


def rows(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tensors(*shapes)


BNHD = ((B, N, H, D),) * 3
GQA = ((B, N, H, D), (B, N, 2, D), (B, N, 2, D))
SHORT = ((B, N - 16, H, D), (B, N, H, D), (B, N, H, D))
LONG = ((B, N, H, D), (B, N - 16, H, D), (B, N - 16, H, D))
PACKED = ((N, H, D),) * 3
CALLS: dict[str, tuple[str, str, tuple[tuple[int, ...], ...], dict[str, Any], str]] = {
    "flash": ("flash_attn", "flash_attn_func", BNHD, {}, "none"),
    "flash, causal": ("flash_attn", "flash_attn_func", BNHD, {"causal": True}, "causal"),
    "flash, GQA": ("flash_attn", "flash_attn_func", GQA, {"causal": True, "softmax_scale": 0.2}, "causal"),
    "flash, more keys": ("flash_attn", "flash_attn_func", SHORT, {"causal": True}, "up to 16 ahead"),
    "flash, more queries": ("flash_attn", "flash_attn_func", LONG, {"causal": True}, "up to -16 ahead"),
    "flash, window": (
        "flash_attn", "flash_attn_func", BNHD, {"causal": True, "window_size": (6, 0)}, "causal, window 7"
    ),
    "flash, window to both sides": (
        "flash_attn", "flash_attn_func", BNHD, {"window_size": (6, 2)}, "up to 2 ahead, window 7"
    ),
    "flash, softcap": ("flash_attn", "flash_attn_func", BNHD, {"softcap": 5.0, "deterministic": True}, "none"),
    "flash, ALiBi": (
        "flash_attn", "flash_attn_func", BNHD, {"causal": True, "alibi_slopes": SLOPES.abs().float()}, "causal + bias"
    ),
    "flash, no argument by name": ("flash_attn", "flash_attn_func", BNHD, {"causal": False}, "none"),
    "flash, a window that is all": ("flash_attn", "flash_attn_func", SHORT, {"window_size": (-1, 0)}, "up to 16 ahead"),
    "flash, ALiBi of each entry": (
        "flash_attn", "flash_attn_func", SHORT, {"alibi_slopes": torch.rand(B, H)}, "bias"
    ),
    "flash, kv packed and lengths": (
        "flash_attn", "flash_attn_varlen_kvpacked_func", ((N, H, D), (N, 2, 2, D)),
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": OTHER_ENDS, "max_seqlen_q": 19, "max_seqlen_k": 11}, "documents",
    ),
    "flash, other lengths and ALiBi": (
        "flash_attn", "flash_attn_varlen_func", PACKED,
        {
            "cu_seqlens_q": ENDS, "cu_seqlens_k": OTHER_ENDS, "max_seqlen_q": 19, "max_seqlen_k": 11,
            "alibi_slopes": torch.rand(H),
        }, "documents + bias",
    ),
    "flash, other lengths in a window": (
        "flash_attn", "flash_attn_varlen_func", PACKED,
        {
            "cu_seqlens_q": OTHER_ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 11, "max_seqlen_k": 19,
            "window_size": (3, 1),
        }, "up to 1 ahead, window 4 + documents",
    ),
    "flash, qkv packed": ("flash_attn", "flash_attn_qkvpacked_func", ((B, N, 3, H, D),), {"causal": True}, "causal"),
    "flash, kv packed": ("flash_attn", "flash_attn_kvpacked_func", ((B, N, H, D), (B, N, 2, 2, D)), {}, "none"),
    "flash, lengths": (
        "flash_attn", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 19, "max_seqlen_k": 19, "causal": True},
        "causal + documents",
    ),
    "flash, lengths in a window": (
        "flash_attn", "flash_attn_varlen_qkvpacked_func", ((N, 3, H, D),),
        {"cu_seqlens": ENDS, "max_seqlen": 19, "causal": True, "window_size": (4, 4)}, "causal, window 5 + documents",
    ),
    "flash, other lengths": (
        "flash_attn", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": OTHER_ENDS, "max_seqlen_q": 19, "max_seqlen_k": 11}, "documents",
    ),
    "flash, other lengths, causal": (
        "flash_attn", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": OTHER_ENDS, "max_seqlen_q": 19, "max_seqlen_k": 11, "causal": True},
        "causal + documents",
    ),
    "flash 3": ("flash_attn_interface", "flash_attn_func", GQA, {"causal": True, "num_splits": 2}, "causal"),
    "flash 3, lengths": (
        "flash_attn_interface", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 19, "max_seqlen_k": 19, "softcap": 4.0},
        "documents",
    ),
    "flash 3, qkv packed": (
        "flash_attn_interface", "flash_attn_qkvpacked_func", ((B, N, 3, H, D),), {"causal": True}, "causal"
    ),
    "flash 3 of 2024": ("old.flash_attn_interface", "flash_attn_func", GQA, {"gqa_parallel": True}, "none"),
    "flash 3 of 2024, lengths": (
        "old.flash_attn_interface", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 19, "max_seqlen_k": 19}, "documents",
    ),
    "flash 4, lengths and sinks": (
        "flash_attn.cute", "flash_attn_varlen_func", PACKED,
        {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "causal": True, "learnable_sink": SINKS}, "causal + documents",
    ),
    "flash 4, lengths that are not given": ("flash_attn.cute", "flash_attn_varlen_func", GQA, {"softcap": 3.0}, "none"),
    "flash 4, bounds that are none": ("flash_attn.cute", "flash_attn_func", GQA, {"window_size": (-1, 0)}, "none"),
    "flash 4, causal and bounds that are none": (
        "flash_attn.cute", "flash_attn_func", GQA, {"window_size": (-1, -1), "causal": True}, "causal"
    ),
    "flash 4, window": (
        "flash_attn.cute", "flash_attn_func", GQA, {"causal": True, "window_size": (5, None)}, "causal, window 6"
    ),
    "flash 4, sinks": ("flash_attn.cute", "flash_attn_func", BNHD, {"learnable_sink": SINKS, "pack_gqa": True}, "none"),
    "xformers": ("xformers.ops", "memory_efficient_attention", BNHD, {"scale": 0.3}, "none"),
    "xformers, bias": (
        "xformers.ops", "memory_efficient_attention", BNHD, {"attn_bias": BIAS}, "bias"
    ),
    "xformers, causal": (
        "xformers.ops", "memory_efficient_attention", BNHD, {"attn_bias": packages.LowerTriangularMask()}, "causal"
    ),
    "xformers, causal, more keys": (
        "xformers.ops", "memory_efficient_attention", SHORT, {"attn_bias": packages.LowerTriangularMask()}, "causal"
    ),
    "xformers, from the bottom right": (
        "xformers.ops", "memory_efficient_attention", SHORT,
        {"attn_bias": packages.LowerTriangularFromBottomRightMask()}, "up to 16 ahead",
    ),
    "mslk": ("mslk.attention.fmha", "memory_efficient_attention", BNHD, {}, "none"),
    "xformers, one head": ("xformers.ops", "memory_efficient_attention", ((B, N, D),) * 3, {}, "none"),
    "xformers, groups of heads": (
        "xformers.ops", "memory_efficient_attention", ((B, N, 2, 2, D),) * 3, {"attn_bias": BIAS.view(B, 2, 2, N, N)},
        "bias",
    ),
    "xformers, causal and bias": (
        "xformers.ops", "memory_efficient_attention", BNHD,
        {"attn_bias": packages.LowerTriangularMaskWithTensorBias(BIAS)}, "causal + bias",
    ),
    "xformers, local": (
        "xformers.ops", "memory_efficient_attention", SHORT,
        {"attn_bias": packages.LocalAttentionFromBottomRightMask(5, 2)}, "up to 18 ahead, window -10",
    ),
    "xformers, local and causal": (
        "xformers.ops", "memory_efficient_attention", BNHD,
        {"attn_bias": packages.LowerTriangularFromBottomRightLocalAttentionMask(5)}, "causal, window 5",
    ),
    "xformers, other lengths": (
        "xformers.ops", "memory_efficient_attention", ((1, N, H, D),) * 3,
        {"attn_bias": packages.BlockDiagonalCausalMask.from_seqlens([5, 15, 1, 19], [9, 11, 10, 10])},
        "causal + documents",
    ),
    "xformers, other lengths from the bottom right": (
        "xformers.ops", "memory_efficient_attention", ((1, N, H, D),) * 3,
        {"attn_bias": packages.BlockDiagonalCausalFromBottomRightMask.from_seqlens([5, 15, 1, 19], [5, 15, 1, 19])},
        "causal + documents",
    ),
    "xformers, packed and local": (
        "xformers.ops", "memory_efficient_attention", ((1, N, H, D),) * 3,
        {"attn_bias": packages.BlockDiagonalCausalLocalAttentionMask.from_seqlens([5, 15, 1, 19])},
        "causal, window 6 + documents",
    ),
    "xformers, packed and local from the bottom right": (
        "xformers.ops", "memory_efficient_attention", ((1, 25, H, D), (1, N, H, D), (1, N, H, D)),
        {
            "attn_bias": packages.BlockDiagonalCausalLocalAttentionFromBottomRightMask.from_seqlens(
                [5, 10, 1, 9], [5, 15, 1, 19]
            )
        }, "causal, window 6 + documents",
    ),
    "xformers, packed": (
        "xformers.ops", "memory_efficient_attention", ((1, N, H, D),) * 3,
        {"attn_bias": packages.BlockDiagonalMask.from_seqlens([5, 15, 1, 19])}, "documents",
    ),
    "xformers, packed and causal": (
        "xformers.ops", "memory_efficient_attention", ((1, N, H, D),) * 3,
        {"attn_bias": packages.BlockDiagonalCausalMask.from_seqlens([5, 15, 1, 19])}, "causal + documents",
    ),
}  # fmt: skip


def called(module: str, name: str, options: dict[str, Any]) -> Callable[..., Any]:
    function = getattr(sys.modules[module], name)

    def f(*args: Tensor) -> Tensor:
        out = function(*args, **options)
        return out[0] if isinstance(out, tuple) else out

    return f


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_packages(name: str) -> None:
    module, function, shapes, options, mask = CALLS[name]
    f = called(module, function, options)
    site = check(f, f, *tensors(*shapes))
    form = "xformers" if "memory" in function else "flash varlen" if "varlen" in function else "flash"
    assert (site.form, site.status, site.tier, site.mask) == (form, "rewritten", 1, mask)


PAGED = {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS, "max_seqlen_q": 19, "max_seqlen_k": 19}
LEFT: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "probabilities": ("flash_attn", "flash_attn_func", {"return_attn_probs": True}, "return_attn_probs"),
    "a cache": ("flash_attn", "flash_attn_with_kvcache", {"causal": True}, "cache"),
    "a second query": ("flash_attn_interface", "flash_attn_func", {"qv": torch.zeros(1)}, "qv"),
    "chunks": ("flash_attn_interface", "flash_attn_func", {"attention_chunk": 8}, "attention_chunk"),
    "a score_mod": ("flash_attn.cute", "flash_attn_func", {"score_mod": abs}, "score_mod"),
    "a window behind the query": ("flash_attn.cute", "flash_attn_func", {"window_size": (5, -1)}, "below 0"),
    "keys in pages": ("flash_attn", "flash_attn_varlen_func", {**PAGED, "block_table": ENDS[None]}, "pages"),
    "keys in pages, flash 4": (
        "flash_attn.cute",
        "flash_attn_varlen_func",
        {"cu_seqlens_q": ENDS, "page_table": ENDS[None]},
        "pages",
    ),
    "lengths of queries alone": ("flash_attn.cute", "flash_attn_varlen_func", {"cu_seqlens_q": ENDS}, "only one of"),
    "keys in pages, xformers": (
        "xformers.ops",
        "memory_efficient_attention",
        {"attn_bias": packages.PagedBlockDiagonalPaddedKeysMask(ENDS[None])},
        "PagedBlockDiagonalPaddedKeysMask",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_with_a_reason(name: str) -> None:
    module, function, options, reason = LEFT[name]
    f = called(module, function, options)
    torch._dynamo.reset()
    shapes = PACKED if "varlen" in function else BNHD
    report = explain(f, *(x.requires_grad_() for x in tensors(*shapes)))
    site = report.sites[0]  # what the stand-in itself computes comes behind it
    assert site.form == ("xformers" if "memory" in function else "flash varlen" if "varlen" in function else "flash")
    assert site.status == "left"
    assert reason in site.reason


# -- torch's varlen_attn, whose own kernels need a GPU: against each document by itself

VARLEN: dict[str, tuple[dict[str, Any], Tensor, int, str]] = {
    "all": ({}, ENDS, H, "documents"),
    "causal": ({"window_size": (-1, 0)}, ENDS, H, "causal + documents"),
    "window": ({"window_size": (4, 0), "scale": 0.3}, ENDS, H, "causal, window 5 + documents"),
    "GQA": ({"window_size": (-1, 0), "enable_gqa": True}, ENDS, 2, "causal + documents"),
    "other lengths": ({}, OTHER_ENDS, H, "documents"),
    "other lengths, causal": ({"window_size": (-1, 0)}, OTHER_ENDS, H, "causal + documents"),
    "other lengths, window": ({"window_size": (4, 2)}, OTHER_ENDS, H, "up to 2 ahead, window 5 + documents"),
}


@pytest.mark.parametrize("name", VARLEN)
def test_varlen(name: str) -> None:
    options, ends, groups, mask = VARLEN[name]
    named = varlen_options(options)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = options.get("window_size", (-1, -1))
        return packages.packed(q, k, v, ENDS, ends, options.get("scale"), False, window)

    site = check(
        lambda q, k, v: varlen_attn(q, k, v, ENDS, ends, 19, 19, **named),
        plain,
        *tensors((N, H, D), (N, groups, D), (N, groups, D)),
    )
    assert (site.form, site.status, site.tier, site.mask) == ("varlen", "rewritten", 1, mask)


# -- what flex_attention returns besides the output


@needs_aux
def test_sinks_through_the_logsumexp() -> None:
    def f(flex: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, aux = flex(q, k, v, None, CAUSAL, return_aux=AuxRequest(lse=True))
        lse = aux.lse.unsqueeze(-1)
        total = torch.logsumexp(torch.cat([lse, sinks.view(1, -1, 1, 1).expand_as(lse)], -1), -1, keepdim=True)
        return out * torch.exp(lse - total)

    def g(flex: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        out, lse = flex(q, k, v, None, CAUSAL, return_lse=True)
        return out * torch.sigmoid(lse - sinks[None, :, None])[..., None]

    for how in (f, g):
        site = check_flex(how, *qkv(), SINKS)
        assert (site.status, site.tier, site.mask) == ("rewritten", 1, "causal")


CAUSAL = create_block_mask(causal, None, None, N, N, device="cpu")


@needs_aux
def test_logsumexp_that_is_used() -> None:
    def f(flex: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, aux = flex(q, k, v, softcap, CAUSAL, return_aux=AuxRequest(lse=True))
        return out, aux.lse

    site = check_flex(f, *qkv())
    assert (site.status, site.tier) == ("rewritten", 1)


def test_flash_4_logsumexp_that_is_used() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = sys.modules["flash_attn.cute"].flash_attn_func(q, k, v, causal=True, return_lse=True)
        return out * torch.sigmoid(lse).transpose(1, 2)[..., None]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT * D**-0.5).masked_fill(
            ~torch.ones(N, N).tril().bool(), -math.inf
        )
        out = packages.batched(q, k, v, None, True, (-1, -1))
        return out * torch.sigmoid(scores.logsumexp(-1)).transpose(1, 2)[..., None]

    assert check(f, plain, *tensors(*BNHD)).status == "rewritten"


# -- dynamic shapes


def test_dynamic_sizes() -> None:
    def causal_documents(flex: Any, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        def mask_mod(b, h, i, j):
            return (ids[i] == ids[j]) & (i >= j)

        n = q.shape[2]
        return flex(
            q, k, v, None, BlockMask.from_kv_blocks(*blocks(n), BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(n, n))
        )

    def blocks(n: int) -> tuple[Tensor, Tensor]:
        return torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, 1, dtype=torch.int32)

    site = check_flex(causal_documents, *qkv(), DOCS, dynamic=True)
    assert (site.status, site.mask) == ("rewritten", "causal + documents")


def test_flash_with_dynamic_sizes_and_more_keys_than_queries() -> None:
    f = called("flash_attn", "flash_attn_func", {"causal": True, "window_size": (6, 0)})
    site = check(f, f, *tensors(*SHORT), dynamic=True)
    assert (site.status, site.mask) == ("rewritten", "causal, window 7")


def test_a_dynamic_window_is_compiled_for_each_value() -> None:
    backend = SUSBackend(c=float("inf"), compiler="eager")
    torch._dynamo.reset()
    function = sys.modules["flash_attn"].flash_attn_func
    compiled = torch.compile(lambda q, k, v, w: function(q, k, v, window_size=(w, 0)), backend=backend, dynamic=True)
    args = tuple(x.requires_grad_() for x in tensors(*BNHD))
    for w in (6, 3):
        torch.testing.assert_close(compiled(*args, w), function(*args, window_size=(w, 0)))


# -- left, with its reason


def stacked(s, b, h, i, j):
    return s + torch.stack([s, s]).sum()


def summed(s, b, h, i, j):
    return s - s.sum()


def no_mask_mod() -> BlockMask:
    indices = torch.arange(3, dtype=torch.int32).expand(1, 1, 3, 3).contiguous()
    return BlockMask.from_kv_blocks(torch.ones(1, 1, 3, dtype=torch.int32), indices, BLOCK_SIZE=16, seq_lengths=(N, N))


@pytest.mark.parametrize(
    ("score_mod", "block_mask", "reason"),
    [
        (stacked, None, "score_mod makes a tensor of shape [2]"),
        (summed, None, "score_mod calls aten.sum"),
        (None, no_mask_mod(), "has blocks and no mask_mod"),
    ],
    ids=["stacked", "summed", "blocks alone"],
)
def test_flex_left_with_a_reason(score_mod: Any, block_mask: Any, reason: str) -> None:
    site = check_flex(lambda flex, q, k, v: flex(q, k, v, score_mod, block_mask), *qkv())
    assert (site.form, site.status) == ("flex", "left")
    assert reason in site.reason


def test_a_score_that_is_squared_is_tier_2() -> None:
    site = check_flex(lambda flex, q, k, v: flex(q, k, v, lambda s, b, h, i, j: s * s, CAUSAL), *qkv())
    assert (site.status, site.tier) == ("rewritten", 2)


def test_calls_without_gradient_stay() -> None:
    f = called("flash_attn", "flash_attn_func", {"causal": True})
    backend = SUSBackend(compiler="eager")
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(f, backend=backend)(*tensors(*BNHD))
    torch.testing.assert_close(out, f(*tensors(*BNHD)))
    assert not backend.report.sites


def test_a_call_that_stays_a_node_is_traced_as_what_it_computes() -> None:
    """The stand-in looks at values, as flash-attn 4 compiles kernels: AOTAutograd cannot trace it."""
    SUSBackend(compiler="eager")

    def keeps(gm: Any, inputs: Any) -> Any:
        assert "call_known" in str(gm.graph)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    keeps.rewrites_attention = True  # type: ignore[attr-defined]
    f = called("flash_attn", "flash_attn_varlen_func", {**PAGED, "causal": True})
    torch._dynamo.reset()
    found, true = (run(g, tensors(*PACKED)) for g in (torch.compile(f, backend=keeps, fullgraph=True), f))
    torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


def test_other_backends_see_nothing_of_it() -> None:
    """Dynamo's substitutes act for backends that rewrite attention only."""
    SUSBackend(compiler="eager")
    nodes: list[str] = []

    def look(gm: Any, _: Any) -> Any:
        nodes.extend(str(n.target) for n in gm.graph.nodes)
        return gm

    f = called("flash_attn", "flash_attn_func", {"causal": True})
    torch._dynamo.reset()
    torch.compile(f, backend=look)(*(x.requires_grad_() for x in tensors(*BNHD)))
    assert nodes
    assert not any("call_known" in name for name in nodes)
    with pytest.raises(Exception, match="does not support backward on CPU"):
        torch.compile(lambda q, k, v: flex_attention(q, k, v), backend=look)(*(x.requires_grad_() for x in qkv()))


# -- positions that restart with each document, as transformers' masks have them


def restarting(flex: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
    def mask_mod(b, h, i, j):
        near = (positions[b, j] <= positions[b, i]) & (positions[b, j] > positions[b, i] - 4)
        return near & (ids[b, i] == ids[b, j])

    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    block = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 1, dtype=torch.int32), indices, BLOCK_SIZE=128, mask_mod=mask_mod, seq_lengths=(N, N)
    )
    return flex(q, k, v, None, block)


def test_positions_that_restart_are_places() -> None:
    ids = DOCS_OF_BATCH
    starts = torch.stack([torch.searchsorted(row, row) for row in ids])
    positions = torch.arange(N) - starts
    site = check_flex(restarting, *qkv(), positions, ids)
    assert (site.status, site.mask) == ("rewritten", "causal, window 4 + documents")
    site = check_flex(restarting, *qkv(), positions * 2, ids)
    assert (site.status, site.mask) == ("rewritten", "documents + mask")


def test_other_positions_at_a_later_call_are_seen() -> None:
    ids = DOCS_OF_BATCH
    positions = torch.arange(N) - torch.stack([torch.searchsorted(row, row) for row in ids])
    backend = SUSBackend(c=float("inf"), compiler="eager")
    torch._dynamo.reset()
    args = tuple(x.requires_grad_() for x in qkv())
    compiled = torch.compile(partial(restarting, flex_attention), backend=backend)
    for p in (positions, positions * 2, positions, positions + 5, positions.flip(-1)):
        torch.testing.assert_close(compiled(*args, p, ids), restarting(eager_flex, *args, p, ids))
    assert [s.mask for s in backend.report.sites] == ["causal, window 4 + documents"]


def test_two_copies_of_the_same_lengths() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return sys.modules["flash_attn"].flash_attn_varlen_func(q, k, v, queries, keys, 19, 19, causal=True)

    site = check(f, f, *tensors(*PACKED), ENDS, ENDS.clone())
    assert (site.status, site.mask) == ("rewritten", "causal + documents")
    backend = SUSBackend(c=float("inf"), compiler="eager")
    torch._dynamo.reset()
    args = tuple(x.requires_grad_() for x in tensors(*PACKED))
    compiled = torch.compile(f, backend=backend)
    for keys in (ENDS.clone(), OTHER_ENDS, ENDS.clone()):
        torch.testing.assert_close(compiled(*args, ENDS, keys), f(*args, ENDS, keys))
