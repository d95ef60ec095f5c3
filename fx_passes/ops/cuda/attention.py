"""Forward and backward of a call that `support` accepts: which kernels, and what is kept. docs/cuda-kernels.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fx_passes.mirror import capturing
from fx_passes.ops import tiled
from fx_passes.ops.cuda import library
from fx_passes.ops.cuda.launch import launch_backward, launch_forward, sizes_of
from fx_passes.ops.cuda.lists import Lists, capacity_for, find_lists, new_lists
from fx_passes.ops.problem import Gradients, Problem, Softmax
from fx_passes.state import get_state


def forward(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor]:
    """Out, softmax, and the byte behind which the rows' lists lie. See `schema.attention`."""
    s = problem.static
    capacity = capacity_for(_host_c(problem, c)) if s.sample else None
    lists = None if capacity is None else new_lists(problem, sizes_of(problem), capacity)
    if s.sample and capturing(problem.query.device) and (state := get_state(s.state)) is not None:
        state.captured(s.site, math.inf if lists is None else lists.c_limit)
    c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, seed, dropout_seed))
    own = not (s.forward == "library" and library.applies(problem))
    out, softmax = launch_forward(problem, c, seed, dropout_seed, lists, own)
    if out is None:
        out = library.forward(problem)
    kept = torch.zeros(1, dtype=torch.uint8, device=out.device) if lists is None else lists.buffer[:1]
    return out, softmax, kept


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
    lists = find_lists(kept, problem, sizes_of(problem))
    if lists is None:
        # No points were drawn because c was infinite or huge, or the lists were lost when `kept` was copied. Only
        # here the host waits for the device, to learn which; in a capture it cannot.
        known = _host_c(problem, c) if capturing(problem.query.device) else float(c)
        capacity = capacity_for(known)
        if capacity is None:
            exact = math.isinf(known) and not bias_grad and library.applies(problem)
            if exact:
                return library.backward(problem, grad), tiled.dense_entries(problem)
            return tiled.backward(problem, grad, out, softmax, c, seed, dropout_seed, bias_grad)
        lists = new_lists(problem, sizes_of(problem), capacity)
        c, seed, dropout_seed = (x.to(problem.query.device) for x in (c, seed, dropout_seed))
        launch_forward(problem, c, seed, dropout_seed, lists, False)
    gradients, found, dlogit, count = launch_backward(problem, grad, out, softmax, lists, dropout_seed)
    bias = _bias_gradient(problem, lists, found, dlogit) if bias_grad else None
    return Gradients(gradients.query, gradients.key, gradients.value, bias, _sinks(problem, grad, out, softmax)), count


def _host_c(problem: Problem, c: Tensor) -> float:
    """c as the host knows it, for the size of the lists; the kernels read the device's c and never exceed them."""
    state = get_state(problem.static.state)
    if state is not None:
        return state.c_of(problem.static.site)
    if capturing(c.device):
        raise RuntimeError("inside a CUDA graph c must come from a SUSBackend, whose c the host knows")
    return float(c)


def _sinks(problem: Problem, grad: Tensor, out: Tensor, softmax: Softmax) -> Tensor | None:
    """Exact: the sink's weight times (0 - delta), summed over rows."""
    if problem.sinks is None:
        return None
    delta = (grad.float() * out.float()).sum(-1)
    weight = (problem.sinks.float()[None, :, None] - softmax.maximum).exp() / softmax.total
    return -(weight * delta).sum((0, 2)).to(problem.sinks.dtype)


def _bias_gradient(problem: Problem, lists: Lists, found: Tensor, dlogit: Tensor) -> Tensor | None:
    """dS of the kept entries, added up in a tensor like the bias; `index_put_` is deterministic where asked for."""
    if problem.attn_bias is None:
        return None
    h, m = problem.query.shape[1:3]
    bias = torch.zeros(problem.attn_bias.shape, dtype=torch.float32, device=dlogit.device)
    item = torch.arange(found.numel(), device=found.device) // lists.capacity
    places = (item // m // h, item // m % h, item % m, found.clamp(min=0).long())
    at = tuple(torch.zeros_like(i) if size == 1 else i for i, size in zip(places, bias.shape, strict=True))
    bias.index_put_(at, dlogit.masked_fill(found < 0, 0), accumulate=True)
    return bias.to(problem.attn_bias.dtype)
