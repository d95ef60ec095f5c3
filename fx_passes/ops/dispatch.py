"""Which implementation computes a call. The one place that knows them all."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from fx_passes.ops import cpu, tile_rule, tiled
from fx_passes.ops.cuda import support
from fx_passes.ops.problem import (
    Gradients,
    Problem,
    Softmax,
    Upstream,
    from_logsumexp,
    in_layout,
    is_logsumexp,
    to_logsumexp,
)
from fx_passes.state import get_state


def _cuda(problem: Problem) -> ModuleType | None:
    """The Triton kernels, imported when a call first needs them, or None where they do not take it."""
    if (
        problem.query.device.type != "cuda"
        or support.unsupported(problem)
        or not support.available(problem.query.device)
    ):
        return None
    from fx_passes.ops.cuda import attention

    return attention


def _note(problem: Problem, reason: str) -> None:
    """A call takes the slower PyTorch path; the state's report will say so."""
    state = get_state(problem.static.state)
    if state is not None:
        state.note_slow(problem.static.site, reason)


def forward(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor]:
    """Out, softmax and the cache of kept entries. See `schema.attention`."""
    if (cuda := _cuda(problem)) is not None:
        result: tuple[Tensor, Softmax, Tensor] = cuda.forward(problem, c, seed, dropout_seed)
        return result
    reason = cpu.unsupported(problem)
    native = reason is None
    if reason is not None:
        _note(problem, (support.unsupported(problem) or "no Triton") if problem.query.is_cuda else reason)
    elif problem.static.sampler != "systematic":
        _note(problem, f"backward: sampler {problem.static.sampler!r}")
    if native and problem.static.forward == "auto" and problem.static.sampler != "tile":
        found = cpu.forward(problem, c, seed, dropout_seed)
        if found is not None:
            return found
        _note(problem, "infinite, NaN or near overflow")
    out, softmax = tiled.forward(problem, dropout_seed)
    out = in_layout(out)
    s = problem.static
    if is_logsumexp(s.sampler, problem.attn_bias, s.softcap):
        softmax = to_logsumexp(softmax)
    kept = (
        cpu.sample(problem, c, seed, dropout_seed) if native else torch.zeros(1, dtype=torch.uint8, device=out.device)
    )
    return out, softmax, kept


def _keeps_most(problem: Problem, c: Tensor) -> bool:
    """Whether whole tiles would keep so much that the dense backward is faster."""
    s, m, n = problem.static, problem.query.shape[2], problem.key.shape[2]
    if s.sampler != "tile" or problem.query.is_cuda:  # on a GPU the kernels' host side decides, without a wait
        return False
    return tile_rule.keeps_most(float(c), m, n, s.left, s.right, problem.diagonal)


def backward(problem: Problem, upstream: Upstream) -> Gradients:
    """Gradients; it also adds to the state's count of kept entries. See `schema.attention_backward`."""
    found: tuple[Gradients, int | Tensor] | None = None
    c = upstream.c
    if (cuda := _cuda(problem)) is not None:
        found = cuda.backward(problem, upstream)
    elif bool(torch.isinf(c)) or _keeps_most(problem, c):
        upstream = replace(upstream, c=torch.full_like(c, torch.inf))
    elif cpu.supports(problem):
        found = cpu.backward(problem, upstream)
    if found is None:
        found = tiled.backward(problem, replace(upstream, softmax=from_logsumexp(upstream.softmax)))
    gradients, count = found
    state = get_state(problem.static.state)
    if state is not None:
        rows = problem.query.shape[:3].numel()
        state.count(count, rows, tiled.dense_entries(problem), problem.query.device)
    return gradients
