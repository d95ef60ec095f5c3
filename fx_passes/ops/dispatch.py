"""Which implementation computes a call. The one place that knows them all."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops import cpu, tiled
from fx_passes.ops.problem import Gradients, Problem, Softmax
from fx_passes.state import get_state


def forward(problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor) -> tuple[Tensor, Softmax, Tensor]:
    """Out, softmax and the cache of kept entries. See `schema.attention`."""
    native = cpu.supports(problem)
    if native and problem.static.forward == "auto":
        return cpu.forward(problem, c, seed)
    out, softmax = tiled.forward(problem, dropout_seed)
    if not out.transpose(1, 2).is_contiguous():  # the layout that the fake implementation promises
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    kept = cpu.sample(problem, c, seed) if native else torch.zeros(1, dtype=torch.uint8, device=out.device)
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
) -> Gradients:
    """Gradients; it also adds to the state's count of kept entries. See `schema.attention_backward`."""
    if bool(torch.isinf(c)) and not bias_grad and tiled.library_backward_applies(problem, softmax):
        gradients, count = tiled.library_backward(problem, grad, out, softmax)
    else:
        found = cpu.backward(problem, grad, out, kept, c, seed) if cpu.supports(problem) else None
        if found is None:
            found = tiled.backward(problem, grad, out, softmax, c, seed, dropout_seed, bias_grad)
        gradients, count = found
    state = get_state(problem.static.state)
    if state is not None:
        state.count(count, problem.query.shape[:3].numel(), tiled.dense_entries(problem))
    return gradients
