"""The operators as PyTorch sees them: schemas, fake implementations and autograd. What computes is in `dispatch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import dispatch
from fx_passes.ops.problem import Problem, Softmax, Static

_TENSORS = 9  # tensor arguments before c
_STATICS = 11


def _problem(tensors: tuple[Tensor | None, ...], static: tuple[Any, ...]) -> Problem:
    return Problem(*tensors, static=Static(*static))  # type: ignore[arg-type, misc]


@torch.library.custom_op("sus::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    prefix: Tensor | None,
    c: Tensor,
    seed: Tensor,
    dropout_seed: Tensor,
    scale: float,
    left: int | None,
    right: int | None,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    sampler: str,
    forward: str,
    sample: bool,
    site: int,
    state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention whose backward uses about c entries per row. See `Problem`, `Static` and `Softmax` for the arguments.

    Returns:
        out [B, H, M, E]; maximum and total [B, H, M], float32 (float64 for float64 inputs);
        kept, uint8 [1]: a cache for the backward that the implementation may fill behind the first byte. Whoever
        copies the tensor loses the cache, and the backward then draws the same entries again.
    """
    tensors = (query, key, value, attn_mask, attn_bias, sinks, query_ids, key_ids, prefix)
    static = (scale, left, right, bottom_right, softcap, dropout_p, sampler, forward, sample, site, state)
    out, softmax, kept = dispatch.forward(_problem(tensors, static), c, seed, dropout_seed)
    return out, softmax.maximum, softmax.total, kept


@attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, value = args[0], args[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    b, h, m, _ = query.shape
    rows = query.new_empty((b, h, m), dtype=dtype)
    # Heads and rows swapped in memory, as the library's kernels return it: what follows is a merge of heads.
    out = query.new_empty((b, m, h, value.shape[-1])).transpose(1, 2)
    return out, rows, torch.empty_like(rows), query.new_empty((1,), dtype=torch.uint8)


@torch.library.custom_op("sus::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    out: Tensor,
    maximum: Tensor,
    total: Tensor,
    kept: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    attn_bias: Tensor | None,
    sinks: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    prefix: Tensor | None,
    c: Tensor,
    seed: Tensor,
    dropout_seed: Tensor,
    bias_grad: bool,
    scale: float,
    left: int | None,
    right: int | None,
    bottom_right: bool,
    softcap: float,
    dropout_p: float,
    sampler: str,
    forward: str,
    sample: bool,
    site: int,
    state: int,
) -> list[Tensor]:
    """Gradients of query, key, value, and of attn_bias (if `bias_grad`) and sinks where they are given."""
    tensors = (query, key, value, attn_mask, attn_bias, sinks, query_ids, key_ids, prefix)
    static = (scale, left, right, bottom_right, softcap, dropout_p, sampler, forward, sample, site, state)
    grads = dispatch.backward(
        _problem(tensors, static), grad, out, Softmax(maximum, total), kept, c, seed, dropout_seed, bias_grad
    )
    found = [grads.query, grads.key, grads.value, grads.attn_bias, grads.sinks]
    return [g for g in found if g is not None]


@attention_backward.register_fake
def _(*args: Any) -> list[Tensor]:
    query, key, value, bias, sinks, bias_grad = args[5], args[6], args[7], args[9], args[10], args[17]
    wanted = (
        [query, key, value] + ([bias] if bias is not None and bias_grad else []) + ([] if sinks is None else [sinks])
    )
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 3], *output)
    ctx.mark_non_differentiable(output[1], output[3])
    ctx.set_materialize_grads(False)
    ctx.static = inputs[_TENSORS + 3 :]


def _backward(
    ctx: Any, grad: Tensor | None, _maximum: None, total_grad: Tensor | None, _kept: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, outputs = saved[: _TENSORS + 3], saved[_TENSORS + 3 :]
    bias_grad = inputs[4] is not None and ctx.needs_input_grad[4]
    if grad is None:
        grad = torch.zeros_like(outputs[0])
    width = grad.shape[-1]
    if total_grad is not None:
        grad, outputs, inputs = _with_total(grad, total_grad, outputs, inputs)
    grads = list(attention_backward(grad, *outputs, *inputs, bias_grad, *ctx.static))
    if total_grad is not None:
        grads[2] = grads[2][..., :width]
    result: list[Tensor | None] = [None] * (_TENSORS + 3 + _STATICS)
    result[:3] = grads[:3]
    rest = list(grads[3:])
    if bias_grad:
        result[4] = rest.pop(0)
    if inputs[5] is not None:
        result[5] = rest.pop(0)
    return tuple(result)


def _with_total(
    grad: Tensor, total_grad: Tensor, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a backward gets that also has a gradient of the totals, and so of the logsumexp.

    That gradient, times the weight, is added to the gradient of each logit, W (dO . V - dO . O). One more column does
    it: 1 in dO, 0 in V and minus the gradient in O.
    """
    out, maximum, total, kept = outputs
    query, key, value, *rest = inputs
    column = -(total_grad * total)[..., None].to(out.dtype)
    more = (
        torch.cat([grad, torch.ones_like(grad[..., :1])], -1),
        torch.cat([out, column], -1),
        torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    )
    return more[0], (more[1], maximum, total, kept), (query, key, more[2], *rest)


attention.register_autograd(_backward, setup_context=_setup)
