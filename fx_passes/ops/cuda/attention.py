"""Forward and backward of a call that `support` accepts: which kernels, and what is kept. docs/cuda-kernels.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fx_passes.device_state import capturing
from fx_passes.ops import tile_rule, tiled
from fx_passes.ops.cuda import library
from fx_passes.ops.cuda.launch import launch_backward, launch_forward
from fx_passes.ops.cuda.launch_tile import launch_tile_backward, launch_tile_draw
from fx_passes.ops.cuda.lists import Lists, c_limit, capacity_for, find_lists, new_lists
from fx_passes.ops.problem import (
    Gradients,
    Problem,
    Softmax,
    Upstream,
    from_logsumexp,
    is_logsumexp,
    sink_gradient,
    sink_weights,
    to_logsumexp,
)
from fx_passes.state import get_state

P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(call: Callable[Concatenate[Problem, P], R]) -> Callable[Concatenate[Problem, P], R]:
    """Triton launches on the current device, whatever device its tensors are on. PyTorch sets none for an operator."""

    @wraps(call)
    def guarded(problem: Problem, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.cuda.device_of(problem.query):  # type: ignore[no-untyped-call]
            return call(problem, *args, **kwargs)

    return guarded


@_on_its_device
def forward(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor]:
    """Out, softmax, and the byte behind which lies what the backward wants to know. See `schema.attention`."""
    if problem.static.sampler == "tile":
        return _tile_forward(problem, c, dropout_seed)
    s = problem.static
    capacity = capacity_for(_host_c(problem, c)) if s.sample else None
    lists = None if capacity is None else new_lists(problem, capacity)
    if s.sample:
        _note_capture(problem, math.inf if capacity is None else c_limit(capacity))
    c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, seed, dropout_seed))
    own = not (s.forward == "library" and library.applies(problem))
    out, softmax = launch_forward(problem, c, seed, dropout_seed, lists, with_out=own)
    if out is None:
        out = library.forward(problem)
    kept = torch.zeros(1, dtype=torch.uint8, device=out.device) if lists is None else lists.buffer[:1]
    return out, softmax, kept


@_on_its_device
def backward(problem: Problem, upstream: Upstream) -> tuple[Gradients, int | Tensor]:
    """Gradients, and the number of entries used. See `schema.attention_backward`."""
    if problem.static.sampler == "tile":
        return _tile_backward(problem, upstream)
    grad, out, softmax, c = upstream.grad, upstream.out, upstream.softmax, upstream.c
    dropout_seed = upstream.dropout_seed
    lists = find_lists(upstream.kept, problem)
    if lists is None:
        # No points were drawn because c was infinite or huge, or the lists were lost when `kept` was copied. Only
        # here the host waits for the device, to learn which; in a capture it cannot.
        known = _host_c(problem, c) if capturing(problem.query.device) else float(c)
        capacity = capacity_for(known)
        if capacity is None:
            kernel = library.kernel_of(problem) if math.isinf(known) else 0
            if kernel:  # whose own forward runs once more: its backward wants its logsumexp
                out, lse = library.forward_with_lse(problem, kernel)
                return library.exact_backward(problem, kernel, grad, out, lse), tiled.dense_entries(problem)
            return tiled.backward(problem, upstream)
        lists = new_lists(problem, capacity)
        c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, upstream.seed, dropout_seed))
        launch_forward(problem, c, seed, dropout_seed, lists, with_out=False)
    bias: Tensor | None = None
    g, found, dlogit, count = launch_backward(problem, grad, out, softmax, lists, dropout_seed)
    if upstream.bias_grad:
        bias = _bias_gradient(problem, _places(problem, lists, found), dlogit.masked_fill(found < 0, 0))
    return Gradients(g.query, g.key, g.value, bias, _sinks(problem, grad, out, softmax)), count


_KERNELS = 4  # numbers of the library's kernels, 0 for none


def _tile_forward(problem: Problem, c: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor]:
    """The library's forward, or a plain one of ours; the byte's storage is as long as its code, see `_tile_plan`."""
    s, device = problem.static, problem.query.device
    kernel, capacity = library.kernel_of(problem), 0
    if s.sample:
        capacity = _tile_capacity(problem, _host_c(problem, c))
        _note_capture(problem, tile_rule.c_limit(capacity, problem.key.shape[2]) if capacity else math.inf)
    if kernel:
        out, lse = library.forward_with_lse(problem, kernel)
        softmax = Softmax(lse, lse.new_empty(0))
    else:
        own, softmax = launch_forward(problem, c, dropout_seed, dropout_seed.to(device), None, with_out=True)
        assert own is not None
        out = own
        if is_logsumexp(s.sampler, problem.attn_bias, s.softcap):
            softmax = to_logsumexp(softmax)
    return out, softmax, torch.empty(1 + kernel + _KERNELS * capacity, dtype=torch.uint8, device=device)[:1]


def _tile_capacity(problem: Problem, c: float) -> int:
    """Tiles per block of rows that there is room for, or 0 where the dense backward is as fast: then it is exact."""
    s, m, n = problem.static, problem.query.shape[2], problem.key.shape[2]
    if tile_rule.keeps_most(c, m, n, s.left, s.right, problem.diagonal):
        return 0
    return tile_rule.capacity_for(c, n)


def _tile_plan(problem: Problem, kept: Tensor, c: Tensor) -> tuple[int, int]:
    """The library's kernel of the forward (0: none) and the capacity (0: exact), as the forward chose them."""
    storage = kept.untyped_storage()
    if kept.storage_offset() or storage.nbytes() == 1:
        # A copy, whose storage tells nothing, or an exact call of our own forward: then this is the same.
        return library.kernel_of(problem), _tile_capacity(problem, _host_c(problem, c))
    code = storage.nbytes() - 1
    return code % _KERNELS, code // _KERNELS


def _tile_backward(problem: Problem, upstream: Upstream) -> tuple[Gradients, int | Tensor]:
    grad, out, softmax, c = upstream.grad, upstream.out, upstream.softmax, upstream.c
    (kernel, capacity), device = _tile_plan(problem, upstream.kept, c), problem.query.device
    # A gradient of the logsumexp comes as one more column of dO and O, which the library does not take.
    if not capacity and kernel and grad.shape[-1] == problem.query.shape[-1]:
        return library.exact_backward(problem, kernel, grad, out, softmax.maximum), tiled.dense_entries(problem)
    if not capacity:  # exact, by tiles that are all kept
        c, capacity = c.new_full((), math.inf), tile_rule.count(problem.key.shape[2], tile_rule.KEYS)
    c, seed, dropout_seed = (x.to(device) for x in (c, upstream.seed, upstream.dropout_seed))
    tiles = launch_tile_draw(problem, grad, out, softmax, c, seed, capacity)
    g, count = launch_tile_backward(problem, grad, softmax, tiles, dropout_seed, upstream.bias_grad)
    sinks = None if problem.sinks is None else _sinks(problem, grad, out, from_logsumexp(softmax))
    return Gradients(g.query, g.key, g.value, g.attn_bias, sinks), count


def _note_capture(problem: Problem, limit: float) -> None:
    s = problem.static
    if capturing(problem.query.device) and (state := get_state(s.state)) is not None:
        state.captured(s.site, limit)


def _host_c(problem: Problem, c: Tensor) -> float:
    """c as the host knows it, for the size of the lists; the kernels read the device's c and never exceed them."""
    state = get_state(problem.static.state)
    if state is not None:
        return state.c_of(problem.static.site)
    if c.device.type == "cpu":
        return float(c)
    if capturing(c.device):
        raise RuntimeError("inside a CUDA graph c must come from a SUSBackend, whose c the host knows")
    return float(c)


def _sinks(problem: Problem, grad: Tensor, out: Tensor, softmax: Softmax) -> Tensor | None:
    if problem.sinks is None:
        return None
    delta = (grad.float() * out.float()).sum(-1)
    return sink_gradient(problem, sink_weights(problem, softmax), delta)


def _places(problem: Problem, lists: Lists, found: Tensor) -> tuple[Tensor, ...]:
    """Batch, head, row and key of every slot."""
    h, m = problem.query.shape[1:3]
    item = torch.arange(found.numel(), device=found.device) // lists.capacity
    return item // m // h, item // m % h, item % m, found.clamp(min=0).long()


def _bias_gradient(problem: Problem, places: tuple[Tensor, ...], dlogit: Tensor) -> Tensor | None:
    """dS of the kept entries, added up in a tensor like the bias; `index_put_` is deterministic where asked for."""
    if problem.attn_bias is None:
        return None
    bias = torch.zeros(problem.attn_bias.shape, dtype=torch.float32, device=dlogit.device)
    at = tuple(torch.zeros_like(i) if size == 1 else i for i, size in zip(places, bias.shape, strict=True))
    bias.index_put_(at, dlogit, accumulate=True)
    return bias.to(problem.attn_bias.dtype)
