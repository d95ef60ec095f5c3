"""Forward and backward of a call that `support` accepts: which kernels, and what is kept. docs/cuda-kernels.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fx_passes.mirror import capturing
from fx_passes.ops import tiled
from fx_passes.ops.cuda import library
from fx_passes.ops.cuda.launch import launch_backward, launch_forward
from fx_passes.ops.cuda.launch_block import launch_block_backward, launch_select
from fx_passes.ops.cuda.lists import BlockLists, Lists, c_limit, capacity_for, find_lists, new_lists
from fx_passes.ops.problem import Gradients, Problem, Softmax, sink_gradient, sink_weights
from fx_passes.ops.tiled.block import ROWS
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
    """Out, softmax, and the byte behind which the lists lie. See `schema.attention`."""
    s = problem.static
    capacity = capacity_for(problem, _host_c(problem, c)) if s.sample else None
    lists = None if capacity is None else new_lists(problem, capacity)
    if s.sample and capturing(problem.query.device) and (state := get_state(s.state)) is not None:
        state.captured(s.site, math.inf if capacity is None else c_limit(capacity))
    c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, seed, dropout_seed))
    own = not (s.forward == "library" and library.applies(problem))
    out, softmax = launch_forward(
        problem, c, seed, dropout_seed, lists if isinstance(lists, Lists) else None, with_out=own
    )
    if isinstance(lists, BlockLists):
        launch_select(problem, softmax, c, seed, lists)
    if out is None:
        out = library.forward(problem)
    kept = torch.zeros(1, dtype=torch.uint8, device=out.device) if lists is None else lists.buffer[:1]
    return out, softmax, kept


@_on_its_device
def backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    softmax: Softmax,
    kept: Tensor,
    c: Tensor,
    seed: Tensor,
    dropout_seed: Tensor,
    bias_grad: bool,
) -> tuple[Gradients, int | Tensor]:
    """Gradients, and the number of entries used. See `schema.attention_backward`."""
    lists = find_lists(kept, problem)
    if lists is None:
        # No points were drawn because c was infinite or huge, or the lists were lost when `kept` was copied. Only
        # here the host waits for the device, to learn which; in a capture it cannot.
        known = _host_c(problem, c) if capturing(problem.query.device) else float(c)
        capacity = capacity_for(problem, known)
        if capacity is None:
            exact = math.isinf(known) and not bias_grad and library.applies(problem)
            if exact:
                return library.backward(problem, grad), tiled.dense_entries(problem)
            return tiled.backward(problem, grad, out, softmax, c, seed, dropout_seed, bias_grad)
        lists = new_lists(problem, capacity)
        c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, seed, dropout_seed))
        if isinstance(lists, BlockLists):
            launch_select(problem, softmax, c, seed, lists)
        else:
            launch_forward(problem, c, seed, dropout_seed, lists, with_out=False)
    bias: Tensor | None = None
    if isinstance(lists, BlockLists):
        g, dlogit, count = launch_block_backward(problem, grad, out, softmax, lists, dropout_seed, bias_grad)
        if dlogit is not None:
            bias = _bias_gradient(problem, _places_of_blocks(problem, lists), dlogit)
    else:
        g, found, dlogit, count = launch_backward(problem, grad, out, softmax, lists, dropout_seed)
        if bias_grad:
            bias = _bias_gradient(problem, _places(problem, lists, found), dlogit.masked_fill(found < 0, 0))
    return Gradients(g.query, g.key, g.value, bias, _sinks(problem, grad, out, softmax)), count


def _host_c(problem: Problem, c: Tensor) -> float:
    """c as the host knows it, for the size of the lists; the kernels read the device's c and never exceed them."""
    state = get_state(problem.static.state)
    if state is not None:
        return state.c_of(problem.static.site)
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


def _places_of_blocks(problem: Problem, lists: BlockLists) -> tuple[Tensor, ...]:
    """The same for each row of a block, broadcast against one another: [B, H, blocks, ROWS, capacity]."""
    b, h, blocks, _ = lists.found.shape
    sizes = ((b, 1, 1, 1), (h, 1, 1, 1), (blocks, ROWS, 1))
    batch, head, row = (torch.arange(math.prod(s), device=lists.found.device).view(s) for s in sizes)
    # Rows behind the last one have dS = 0.
    return batch[:, None], head, row.clamp(max=problem.query.shape[2] - 1), lists.found.long()[:, :, :, None]


def _bias_gradient(problem: Problem, places: tuple[Tensor, ...], dlogit: Tensor) -> Tensor | None:
    """dS of the kept entries, added up in a tensor like the bias; `index_put_` is deterministic where asked for."""
    if problem.attn_bias is None:
        return None
    bias = torch.zeros(problem.attn_bias.shape, dtype=torch.float32, device=dlogit.device)
    at = tuple(torch.zeros_like(i) if size == 1 else i for i, size in zip(places, bias.shape, strict=True))
    bias.index_put_(at, dlogit, accumulate=True)
    return bias.to(problem.attn_bias.dtype)
