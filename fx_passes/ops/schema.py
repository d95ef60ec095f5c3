"""The operators as PyTorch sees them: schemas, fake implementations and autograd. What computes is in `dispatch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import dispatch
from fx_passes.ops.exact import exact_attention
from fx_passes.ops.problem import Problem, Softmax, Static, is_logsumexp
from fx_passes.ops.transforms import has_tangent

_TENSORS = 9  # tensor arguments before c
_STATICS = 11
_BIAS_GRAD = 5 + _TENSORS + 3  # its place among the backward's arguments


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
        out [B, H, M, E]; maximum and total [B, H, M], float32 (float64 for float64 inputs), or the logsumexp and an
        empty tensor (`problem.is_logsumexp`);
        kept, uint8 [1]: a cache for the backward that the implementation may fill behind the first byte. Whoever
        copies the tensor loses the cache, and the backward then draws the same entries again.
    """
    if has_tangent(query, key, value, attn_bias, sinks):
        raise NotImplementedError(
            "SUS attention in a compiled graph has no forward-mode derivative, and a tangent came in: compute tangents "
            "without torch.compile (there SUS attention has exact ones), or compile without SUS"
        )
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
    softcap, sampler = args[16], args[18]
    total = query.new_empty(0, dtype=dtype) if is_logsumexp(sampler, args[4], softcap) else torch.empty_like(rows)
    return out, rows, total, query.new_empty((1,), dtype=torch.uint8)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, attn_bias and sinks.

    That of attn_bias is empty unless `bias_grad`, and that of sinks where there are none. (Not a list of those that
    are wanted: PyTorch batches backwards, for `is_grads_batched`, of operators only that return single tensors.)
    """
    tensors = (query, key, value, attn_mask, attn_bias, sinks, query_ids, key_ids, prefix)
    static = (scale, left, right, bottom_right, softcap, dropout_p, sampler, forward, sample, site, state)
    grads = dispatch.backward(
        _problem(tensors, static), grad, out, Softmax(maximum, total), kept, c, seed, dropout_seed, bias_grad
    )
    bias, sinks = (grad.new_empty(0) if g is None else g for g in (grads.attn_bias, grads.sinks))
    return grads.query, grads.key, grads.value, bias, sinks


@attention_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    grad, query, key, value, bias, sinks = args[0], args[5], args[6], args[7], args[9], args[10]
    wanted = (query, key, value, bias if args[_BIAS_GRAD] else None, sinks)
    return tuple(
        grad.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *inputs[5 : 5 + _TENSORS])
    ctx.bias_grad, ctx.static = inputs[_BIAS_GRAD], Static(*inputs[_BIAS_GRAD + 1 :])


def _second_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients: those of the exact ones, which SUS gradients have as their mean."""
    s = ctx.static
    if s.dropout_p:
        raise NotImplementedError(
            "SUS attention has no second derivative with dropout: set dropout_p=0, or compute gradients of gradients "
            "with F.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    grad, query, key, value, mask, bias, sinks, *others = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        live: list[Any] = [None if x is None else _live(x) for x in (grad, query, key, value, bias, sinks)]
        grad, query, key, value, bias, sinks = live
        query_ids, key_ids, prefix = others
        masks = (mask, bias, sinks, query_ids, key_ids, prefix)
        out = exact_attention(query, key, value, *masks, s.scale, s.left, s.right, s.bottom_right, s.softcap)
        by = (query, key, value, bias if ctx.bias_grad else None, sinks)
        used = [(x, u) for x, u in zip(by, upstream, strict=True) if x is not None and u is not None]
        first = torch.autograd.grad(out, [x for x, _ in used], grad, create_graph=True)
        wanted = [x for x in live if x is not None]
        second = torch.autograd.grad(first, wanted, [u for _, u in used], create_graph=create_graph, allow_unused=True)
    found = iter(second)
    by_place = {place: next(found) for place, x in zip((0, 5, 6, 7, 9, 10), live, strict=True) if x is not None}
    return tuple(by_place.get(place) for place in range(_BIAS_GRAD + 1 + _STATICS))


def _live(x: Tensor) -> Tensor:
    """An alias: derivatives by it are partial ones, without what the tensor's own history adds."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _vmapped_backward(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """One call for each gradient of a batch, such as the rows of a jacobian."""
    calls = [
        attention_backward(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(same) for same in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


attention_backward.register_autograd(_second_backward, setup_context=_setup_backward)
attention_backward.register_vmap(_vmapped_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[: _TENSORS + 3], *output)
    # The logsumexp has a gradient: through the totals, or where there are none, itself.
    ctx.mark_non_differentiable(output[2 if _keeps_logsumexp(output[2]) else 1], output[3])
    ctx.set_materialize_grads(False)
    ctx.static = inputs[_TENSORS + 3 :]


def _keeps_logsumexp(total: Tensor) -> bool:
    """Whether a call's `maximum` is the logsumexp (`problem.is_logsumexp`): its total has no elements then."""
    return total.dim() == 1


def _backward(
    ctx: Any, grad: Tensor | None, maximum_grad: Tensor | None, total_grad: Tensor | None, _kept: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    inputs, outputs = saved[: _TENSORS + 3], saved[_TENSORS + 3 :]
    lse_grad = maximum_grad if total_grad is None else total_grad * outputs[2]
    bias_grad = inputs[4] is not None and ctx.needs_input_grad[4]
    if grad is None:
        grad = torch.zeros_like(outputs[0])
    width = grad.shape[-1]
    exact_lse = lse_grad is not None and torch.is_grad_enabled()  # for gradients of gradients
    if lse_grad is not None and not exact_lse:
        grad, outputs, inputs = _with_lse(grad, lse_grad, outputs, inputs)
    grads = list(attention_backward(grad, *outputs, *inputs, bias_grad, *ctx.static))
    if lse_grad is not None and not exact_lse:
        grads[2] = grads[2][..., :width]
    result: list[Tensor | None] = [None] * (_TENSORS + 3 + _STATICS)
    result[:3] = grads[:3]
    if bias_grad:
        result[4] = grads[3]
    if inputs[5] is not None:
        result[5] = grads[4]
    if exact_lse and lse_grad is not None:
        for i, more in _grads_of_lse(lse_grad, inputs, ctx.static).items():
            before = result[i]
            result[i] = more if before is None else before + more
    return tuple(result)


def _grads_of_lse(grad: Tensor, inputs: tuple[Any, ...], static: tuple[Any, ...]) -> dict[int, Tensor]:
    """Exact gradients, by the operands' places, that have gradients again; `grad` is that of the logsumexp."""
    live = {i: _live(inputs[i]) for i in (0, 1, 4, 5) if inputs[i] is not None and inputs[i].requires_grad}
    operands: list[Any] = [live.get(i, x) for i, x in enumerate(inputs[:_TENSORS])]
    scale, left, right, bottom_right, softcap = static[:5]
    bands = {"left": left, "right": right, "bottom_right": bottom_right}
    _, lse = exact_attention(*operands, scale=scale, softcap=softcap, **bands, return_lse=True)  # type: ignore[misc]
    found = torch.autograd.grad(lse, list(live.values()), grad, create_graph=True)
    return dict(zip(live, found, strict=True))


def _with_lse(
    grad: Tensor, lse_grad: Tensor, outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What a backward gets that also has a gradient of the logsumexp.

    That gradient, times the weight, is added to the gradient of each logit, W (dO . V - dO . O). One more column does
    it: 1 in dO, 0 in V and minus the gradient in O.
    """
    out, maximum, total, kept = outputs
    query, key, value, *rest = inputs
    column = -lse_grad[..., None].to(out.dtype)
    more = (
        torch.cat([grad, torch.ones_like(grad[..., :1])], -1),
        torch.cat([out, column], -1),
        torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    )
    return more[0], (more[1], maximum, total, kept), (query, key, more[2], *rest)


attention.register_autograd(_backward, setup_context=_setup)
