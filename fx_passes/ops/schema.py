"""The operators as PyTorch sees them: schemas, fake implementations and autograd. What computes is in `dispatch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import dispatch
from fx_passes.ops.exact import exact_attention
from fx_passes.ops.problem import STATICS, TENSORS, Problem, Softmax, Static, Upstream, empty_output, is_logsumexp
from fx_passes.ops.transforms import has_tangent
from fx_passes.state import get_state

_DRAWN = ("c", "seed", "dropout_seed")
_OUTPUTS = ("out", "maximum", "total", "kept")
_Given = Mapping[str, Any]  # arguments of an operator by name


def _static(given: _Given) -> Static:
    return Static(**{name: given[name] for name in STATICS})


def _problem(given: _Given) -> Problem:
    return Problem(**{name: given[name] for name in TENSORS}, static=_static(given))


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
    given = locals()
    if has_tangent(query, key, value, attn_bias, sinks):
        raise NotImplementedError(
            "SUS attention in a compiled graph has no forward-mode derivative, and a tangent came in: compute tangents "
            "without torch.compile (there SUS attention has exact ones), or compile without SUS"
        )
    out, softmax, kept = dispatch.forward(_problem(given), c, seed, dropout_seed)
    return out, softmax.maximum, softmax.total, kept


def _named(names: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


# In the order in which PyTorch hands arguments to fakes and to autograd.
_ARGUMENTS = tuple(argument.name for argument in torch.ops.sus.attention.default._schema.arguments)


@attention.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = _named(_ARGUMENTS, args)
    query, value = given["query"], given["value"]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    b, h, m, _ = query.shape
    rows = query.new_empty((b, h, m), dtype=dtype)
    out = empty_output(query, (b, h, m, value.shape[-1]))
    alone = is_logsumexp(given["sampler"], given["attn_bias"], given["softcap"])
    total = query.new_empty(0, dtype=dtype) if alone else torch.empty_like(rows)
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
    upstream = Upstream(grad, out, Softmax(maximum, total), kept, c, seed, dropout_seed, bias_grad)
    grads = dispatch.backward(_problem(locals()), upstream)
    return (
        grads.query,
        grads.key,
        grads.value,
        grad.new_empty(0) if grads.attn_bias is None else grads.attn_bias,
        grad.new_empty(0) if grads.sinks is None else grads.sinks,
    )


_DIFFERENTIABLE = ("query", "key", "value", "attn_bias", "sinks")  # the backward's results are their gradients
_BACKWARD_ARGUMENTS = tuple(argument.name for argument in torch.ops.sus.attention_backward.default._schema.arguments)


@attention_backward.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    given = _named(_BACKWARD_ARGUMENTS, args)
    grad = given["grad"]
    wanted = [given[name] if _wanted(name, given["bias_grad"]) else None for name in _DIFFERENTIABLE]
    return tuple(
        grad.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted
    )


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = _named(_BACKWARD_ARGUMENTS, inputs)
    ctx.save_for_backward(given["grad"], *(given[name] for name in TENSORS))
    ctx.bias_grad, ctx.static = given["bias_grad"], _static(given)


def _second_backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the gradients: those of the exact ones, which SUS gradients have as their mean."""
    if ctx.static.dropout_p:
        raise NotImplementedError(
            "SUS attention has no second derivative with dropout: set dropout_p=0, or compute gradients of gradients "
            "with F.scaled_dot_product_attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        )
    saved = _named(("grad", *TENSORS), ctx.saved_tensors)
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        live = {name: _live(saved[name]) for name in ("grad", *_DIFFERENTIABLE) if saved[name] is not None}
        operands = {name: live.get(name, saved[name]) for name in TENSORS}
        out = exact_attention(**operands, **_exact_options(ctx.static))
        by_name = zip(_DIFFERENTIABLE, upstream, strict=True)
        used = {name: u for name, u in by_name if u is not None and name in live and _wanted(name, ctx.bias_grad)}
        first = torch.autograd.grad(out, [live[name] for name in used], live["grad"], create_graph=True)
        second = torch.autograd.grad(
            first, list(live.values()), list(used.values()), create_graph=create_graph, allow_unused=True
        )
    found = dict(zip(live, second, strict=True))
    return tuple(found.get(name) for name in _BACKWARD_ARGUMENTS)


def _wanted(name: str, bias_grad: bool) -> bool:
    """Whether the backward returns a gradient of this operand, if the call has it."""
    return name != "attn_bias" or bias_grad


def _exact_options(s: Static) -> dict[str, Any]:
    return {name: getattr(s, name) for name in ("scale", "left", "right", "bottom_right", "softcap")}


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
    given, results = _named(_ARGUMENTS, inputs), _named(_OUTPUTS, output)
    ctx.save_for_backward(*(given[name] for name in (*TENSORS, *_DRAWN)), *output)
    # The logsumexp has a gradient: through the totals, or where there are none, itself.
    alone = _keeps_logsumexp(results["total"])
    ctx.mark_non_differentiable(results["total" if alone else "maximum"], results["kept"])
    ctx.set_materialize_grads(False)
    ctx.static = _static(given)


def _keeps_logsumexp(total: Tensor) -> bool:
    """Whether a call's `maximum` is the logsumexp (`problem.is_logsumexp`): its total has no elements then."""
    return total.dim() == 1


def _backward(
    ctx: Any, grad: Tensor | None, maximum_grad: Tensor | None, total_grad: Tensor | None, _kept: None
) -> tuple[Tensor | None, ...]:
    saved = _named((*TENSORS, *_DRAWN, *_OUTPUTS), ctx.saved_tensors)
    lse_grad = maximum_grad if total_grad is None else total_grad * saved["total"]
    needs = _named(_ARGUMENTS, ctx.needs_input_grad)
    bias_grad = saved["attn_bias"] is not None and needs["attn_bias"]
    if grad is None:
        grad = torch.zeros_like(saved["out"])
    exact_lse = lse_grad is not None and torch.is_grad_enabled()  # for gradients of gradients
    given = {"grad": grad, **saved}
    if lse_grad is not None and not exact_lse:
        given |= _with_lse(grad, lse_grad, saved["out"], saved["value"])
    results = attention_backward(**given, bias_grad=bias_grad, **vars(ctx.static))
    found = {
        name: x
        for name, x in zip(_DIFFERENTIABLE, results, strict=True)
        if saved[name] is not None and _wanted(name, bias_grad)
    }
    if lse_grad is not None and not exact_lse:
        found["value"] = found["value"][..., : grad.shape[-1]]
    if exact_lse and lse_grad is not None:
        for name, more in _grads_of_lse(lse_grad, saved, ctx.static).items():
            found[name] = found[name] + more if name in found else more
    return tuple(found.get(name) for name in _ARGUMENTS)


def _grads_of_lse(grad: Tensor, saved: _Given, static: Static) -> dict[str, Tensor]:
    """Exact gradients, by the operands' names, that have gradients again; `grad` is that of the logsumexp."""
    operands = {name: saved[name] for name in TENSORS}
    live = {
        name: _live(x)
        for name, x in operands.items()
        if name in _DIFFERENTIABLE and name != "value" and x is not None and x.requires_grad
    }
    _, lse = exact_attention(**{**operands, **live}, **_exact_options(static), return_lse=True)
    found = torch.autograd.grad(lse, list(live.values()), grad, create_graph=True)
    return dict(zip(live, found, strict=True))


def _with_lse(grad: Tensor, lse_grad: Tensor, out: Tensor, value: Tensor) -> dict[str, Tensor]:
    """What a backward gets that also has a gradient of the logsumexp.

    That gradient, times the weight, is added to the gradient of each logit, W (dO . V - dO . O). One more column does
    it: 1 in dO, 0 in V and minus the gradient in O.
    """
    column = -lse_grad[..., None].to(out.dtype)
    return {
        "grad": torch.cat([grad, torch.ones_like(grad[..., :1])], -1),
        "out": torch.cat([out, column], -1),
        "value": torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    }


attention.register_autograd(_backward, setup_context=_setup)


def _draw(like: Tensor, state: int, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
    found = get_state(state)
    if found is None:
        raise RuntimeError("the SUSBackend that compiled this graph no longer exists; keep a reference to it")
    return found.draw(like.device, sites)


def _fake_draw(like: Tensor, state: int, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
    return like.new_empty((len(sites),), dtype=torch.float64), like.new_empty((), dtype=torch.int64)


def _vmapped_draw(
    info: Any, in_dims: Any, like: Tensor, state: int, sites: Sequence[int]
) -> tuple[tuple[Tensor, Tensor], tuple[None, None]]:
    """One draw for the whole batch: entries are told apart by their place in it."""
    return draw(like, state, sites), (None, None)


# Not by `custom_op`: an operator whose results have no gradient needs no autograd, whose node torch.func would refuse.
_library: Any = torch.library.Library("sus", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "draw(Tensor like, int state, int[] sites) -> (Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)
_library.impl("draw", _draw, "CompositeExplicitAutograd")
_library.impl("draw", torch.library.fallthrough_kernel, "Autograd")
torch.library.register_fake("sus::draw", _fake_draw)
torch.library.register_vmap("sus::draw", _vmapped_draw)

# draw(like, state, sites): c of each site (float64 [sites]) and a fresh seed (0-dim int64) of a state, on the device of
# `like`.
draw = torch.ops.sus.draw.default
