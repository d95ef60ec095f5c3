"""The native path as `dispatch` sees it: which problems it takes, forward with sampling, sparse backward."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace

import torch
from torch import Tensor

from fx_passes.ops.cpu import bind, kept
from fx_passes.ops.problem import (
    LARGEST_C,
    Gradients,
    Problem,
    Softmax,
    Upstream,
    empty_output,
    sink_gradient,
    sink_weights,
)

_LARGEST_WIDTH = 256
_FACTORS = (1e-10, 1e10)  # of scale and softcap; src/range.inc counts on it


def unsupported(problem: Problem) -> str | None:
    """Why the native kernel does not compute this problem, or None if it does.

    It takes float32, bfloat16 or float16; head_dim and value dim up to 256; masks, biases, document ids, softcap,
    sinks, windows, prefixes (without a left bound) and dropout; scales and softcaps from 1e-10 to 1e10.
    """
    q, k, v, s = problem.query, problem.key, problem.value, problem.static
    if q.device.type != "cpu":
        return f"device {q.device.type}"
    if q.dtype not in bind.DTYPES:
        return str(q.dtype)
    features = {
        "prefix and a left bound": problem.prefix is not None and s.left is not None,  # a row would see two ranges
        f"scale {s.scale:g}": not _FACTORS[0] <= s.scale <= _FACTORS[1],
        f"softcap {s.softcap:g}": s.softcap != 0 and not _FACTORS[0] <= s.softcap <= _FACTORS[1],
        "empty tensors": q.numel() == 0 or k.numel() == 0,
        f"{k.shape[2]} keys": k.shape[2] >= 1 << 31,
    }
    found = [name for name, has in features.items() if has]
    for name, width in (("head_dim", q.shape[-1]), ("value dim", v.shape[-1])):
        if not 0 < width <= _LARGEST_WIDTH:
            found.append(f"{name} {width}")
    if not found and bind.library() is None:
        found.append("no native kernel on this machine")
    return ", ".join(found) or None


def supports(problem: Problem) -> bool:
    """Whether the native kernel computes this problem (and there is one)."""
    return unsupported(problem) is None


def samples(problem: Problem, c: Tensor) -> bool:
    """Whether the forward of this call draws the backward's entries."""
    s = problem.static
    return s.sample and s.sampler == "systematic" and not math.isinf(float(c))


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _as_read(problem: Problem) -> Problem:
    """With tensors as the native kernel reads them: last dimensions of stride 1, biases in float32, ids in int64."""
    q, k, v, bias = _unit(problem.query), _unit(problem.key), _unit(problem.value), problem.attn_bias
    integers = (problem.query_ids, problem.key_ids, problem.prefix)
    query_ids, key_ids, prefix = (None if x is None else x.long().contiguous() for x in integers)
    bias, sinks = (None if x is None else x.float() for x in (bias, problem.sinks))
    sinks = None if sinks is None else sinks.contiguous()
    read = replace(problem, query=q, key=k, value=v, attn_bias=bias, sinks=sinks)
    return replace(read, query_ids=query_ids, key_ids=key_ids, prefix=prefix)


def _native() -> ctypes.CDLL:
    native = bind.library()
    if native is None:
        raise RuntimeError("there is no native kernel; ask `supports` first")
    return native


def _empty_softmax(problem: Problem) -> Softmax:
    shape = problem.query.shape[:3]
    return Softmax(*(problem.query.new_empty(shape, dtype=torch.float32) for _ in range(2)))


def forward(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor] | None:
    """Out [B, H, M, E] (heads and rows swapped in memory), softmax, and the cache of kept entries.

    None where numbers are so large that a sum may overflow, infinite (but biases of -inf) or NaN: see src/range.inc.
    """
    q, v = problem.query, problem.value
    b, h, m, _ = q.shape
    out = empty_output(q, (b, h, m, v.shape[-1]))
    softmax = _empty_softmax(problem)
    cache = _run(problem, c, seed, dropout_seed, out, softmax)
    return None if cache is None else (out, softmax, cache)


def sample(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> Tensor:
    """The cache of kept entries for a forward that another kernel computed: one more pass over the logits."""
    cache = _run(problem, c, seed, dropout_seed, None, None) if samples(problem, c) else None
    return kept.empty() if cache is None else cache


def _draw(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> kept.Draw:
    dropped = problem.static.drop_below
    return kept.Draw(min(float(c), LARGEST_C), int(seed), int(dropout_seed) if dropped else 0, dropped)


def _run(
    problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor, out: Tensor | None, softmax: Softmax | None
) -> Tensor | None:
    wanted = samples(problem, c)
    draw = _draw(problem, c, seed, dropout_seed)
    if softmax is None and problem.sinks is not None:
        softmax = _empty_softmax(problem)
    rows = (None, None) if softmax is None else (softmax.maximum, softmax.total)
    limit = draw.c if wanted else 0.0
    with bind.forward(_native(), _as_read(problem), limit, draw.seed, draw.dropout_seed, out, *rows) as lists:
        if not lists.usable:
            return None
        if not wanted:
            return kept.empty()
        cache, parts = kept.allocate(problem, lists.count, draw)
        lists.export(parts.offsets, parts.keys, parts.weights)
    if problem.sinks is not None and softmax is not None:
        parts.sinks.copy_(sink_weights(problem, softmax))
    return cache


def backward(problem: Problem, upstream: Upstream) -> tuple[Gradients, int] | None:
    """Gradients and the number of entries used; None if the cache is lost or was never filled, or as in `forward`."""
    grad, out, c = upstream.grad, upstream.out, upstream.c
    if not samples(problem, c):
        return None
    parts = kept.unpack(upstream.kept, problem, _draw(problem, c, upstream.seed, upstream.dropout_seed))
    if parts is None:
        return None
    inputs = (problem.query, problem.key, problem.value)
    query, key, value = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    bias = None
    if upstream.bias_grad and problem.attn_bias is not None:
        bias = torch.empty(problem.attn_bias.shape, dtype=torch.float32, device=grad.device)
    # Kept weights have biases, ids, prefixes and sinks in them.
    read = _as_read(replace(problem, attn_bias=None, query_ids=None, key_ids=None, prefix=None, sinks=None))
    lists = (parts.offsets, parts.keys, parts.weights)
    gradients = (query, key, value)
    if not bind.backward(_native(), read, _unit(grad), _unit(out), lists, gradients, bias) or _overflowed(gradients):
        return None
    sinks = None
    if problem.sinks is not None:
        delta = torch.linalg.vecdot(grad.float(), out.float())
        sinks = sink_gradient(problem, parts.sinks, delta)
    if bias is not None and problem.attn_bias is not None:
        bias = bias.to(problem.attn_bias.dtype)
    return Gradients(query, key, value, bias, sinks), len(parts.keys)


def _overflowed(gradients: tuple[Tensor, ...]) -> bool:
    """Whether float16 was too small for an estimate, although it may hold the exact gradient."""
    return any(x.dtype == torch.float16 and not bool(x.isfinite().all()) for x in gradients)


def release_memory() -> int:
    """Gives working memory back that native calls have left for later ones: at most 512 MiB. Returns its bytes."""
    native = bind.library()
    return 0 if native is None else int(native.sus_release_memory())
