"""`sus_attention`: the operator as a function, with the signature of F.scaled_dot_product_attention.

`attend` is the same for callers that have proven their arguments: the compiler pass emits it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import schema  # registers the operators
from fx_passes.ops.arguments import (
    as_c,
    as_seed,
    autocast_dtype,
    autocasts,
    broadcast,
    check_arguments,
    check_choice,
    check_state,
    why_left,
)
from fx_passes.ops.documents import as_ids
from fx_passes.ops.exact import exact_attention
from fx_passes.ops.problem import Forward, Sampler, resolve_sampler
from fx_passes.ops.schema import draw
from fx_passes.ops.sharding import is_dtensor, on_shards
from fx_passes.ops.snapshot import as_library_keeps, as_library_returns, snapshot
from fx_passes.ops.transforms import NEEDS_LIBRARY, transform
from fx_passes.state import State, get_state

_default_state = State(float("inf"))
_MASKS = ("attn_mask", "attn_bias", "query_ids", "key_ids", "prefix")


@on_shards
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    c: Tensor,
    seed: Tensor,
    *,
    attn_mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    sampler: Sampler = "auto",
    forward: Forward = "auto",
    site: int = 0,
    state: int = 0,
    return_lse: bool = False,
    own_masks: bool = False,
) -> Any:
    """Attention with a sparse backward; traceable by AOTAutograd. See `Problem` and `Static` for the arguments.

    Query, key and value may have any number of leading dimensions, as for F.scaled_dot_product_attention: they are
    broadcast, and all but the last of them are the batch. Masks and bias may have as many dimensions or fewer.

    Inside of forward-mode AD and of torch.func's transforms it is exact: the operator knows no tangents.

    Masks, a bias without a gradient, ids and sinks may be written to before the backward runs, unless `own_masks` says
    that nobody will do so.

    Returns:
        [..., H, M, E]; with `return_lse` also the logsumexp of each row's logits, [..., H, M] in float32 (float64 for
        float64 inputs), with a gradient. It is 0 where a row sees no key.
    """
    query, key, value, attn_bias = _autocast(query, key, value, attn_bias)
    lead = _leading(query, key, value)
    query, key, value = (_four(x, lead) for x in (query, key, value))
    if key.shape[1] != value.shape[1]:  # F.scaled_dot_product_attention lets each divide the query's heads
        heads = query.shape[1]
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    attn_mask, attn_bias = (None if x is None else _four_mask(x, lead) for x in (attn_mask, attn_bias))
    scale = float(query.shape[-1] or 1) ** -0.5 if scale is None else float(scale)
    if scale < 0:  # the library's kernel masks before it scales: -inf would become inf
        query, scale = -query, -scale
    tensors = (query, key, value, attn_bias, sinks)
    given: dict[str, Any] = {
        "attn_mask": attn_mask,
        "attn_bias": attn_bias,
        "sinks": sinks,
        "query_ids": query_ids,
        "key_ids": key_ids,
        "prefix": prefix,
        "left": left,
        "right": right,
        "bottom_right": bottom_right,
        "softcap": softcap,
    }
    around = transform(*tensors)
    if around is None and not 0 <= dropout_p < 1:
        around = "dropout_p outside of [0, 1)"
    if around is not None:
        if state and (counts := get_state(state)) is not None:
            counts.note_left(around)
        if return_lse:
            out, lse = exact_attention(query, key, value, scale=scale, dropout_p=dropout_p, return_lse=True, **given)
        else:
            out, lse = _exact(query, key, value, scale, dropout_p, given, library=around == NEEDS_LIBRARY), None
        return _shaped(out, lse, lead)
    sample = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if sample and not own_masks:
        given |= {name: snapshot(given[name]) for name in _MASKS if given[name] is not None}
        given["sinks"] = None if sinks is None else sinks.clone()
    dropout_seed = seed
    if dropout_p > 0:
        # From the global generator, as dropout draws everywhere: checkpointing restores it before a recomputation.
        dropout_seed = torch.randint(-(1 << 62), 1 << 62, (), device=query.device)
    out, maximum, total, _ = schema.attention(
        query=query,
        key=key,
        value=value,
        c=c,
        seed=seed,
        dropout_seed=dropout_seed,
        scale=scale,
        dropout_p=dropout_p,
        sampler=resolve_sampler(sampler, query.device),
        forward=forward,
        sample=sample,
        site=site,
        state=state,
        **given,
    )
    return _shaped(out, _lse(maximum, total) if return_lse else None, lead)


def _shaped(out: Tensor, lse: Tensor | None, lead: list[int]) -> Any:
    """What `attend` returns, with the leading dimensions that its operands had."""
    if len(lead) != 2:
        out = out.reshape(*lead, *out.shape[-2:])
        lse = None if lse is None else lse.reshape(*lead, lse.shape[-1])
    return out if lse is None else (out, lse)


def _lse(maximum: Tensor, total: Tensor) -> Tensor:
    """The logsumexp, 0 where a row sees no key; without totals `maximum` is it (`problem.is_logsumexp`)."""
    return maximum.masked_fill(maximum.isinf(), 0) if total.dim() == 1 else maximum + total.log()


@on_shards
def attend_logits(logits: Tensor, value: Tensor, c: Tensor, seed: Tensor, **options: Any) -> Any:
    """``softmax(logits, -1) @ value`` with a sparse backward, for logits of any origin (tier 2).

    It is `attend` with an empty head_dim and the logits as bias: their gradient is dense in memory, with about c
    entries per row that are not zero.
    """
    *lead, m, _ = logits.shape
    query = logits.new_empty((*lead, m, 0), dtype=value.dtype)
    key = value.new_empty((*value.shape[:-1], 0))
    return attend(query, key, value, c, seed, attn_bias=logits, scale=1.0, **options)


def _autocast(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Dtypes as F.scaled_dot_product_attention gets them: autocast casts its floating-point arguments."""
    device = query.device.type
    if not autocasts(device):
        return query, key, value, bias  # type: ignore[return-value]
    cast = [x if x is None else x.to(autocast_dtype(x, device)) for x in (query, key, value, bias)]
    return tuple(cast)  # type: ignore[arg-type]


def _exact(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout_p: float, given: dict[str, Any], library: bool
) -> Tensor:
    """Exact attention: of the library, if that is asked for and has what is given, or else in plain operations."""
    right, masks = given["right"], [given[name] for name in ("attn_mask", "attn_bias") if given[name] is not None]
    known = {"attn_mask", "attn_bias", "right"}
    others = any(isinstance(x, Tensor) or x for name, x in given.items() if name not in known)
    if (
        not library
        or others
        or given["left"] is not None
        or right not in (None, 0)
        or len(masks) + (right is not None) > 1
    ):
        out: Tensor = exact_attention(query, key, value, scale=scale, dropout_p=dropout_p, **given)
        return out
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        masks[0] if masks else None,
        dropout_p,
        right is not None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _leading(query: Tensor, key: Tensor, value: Tensor) -> list[int]:
    """Leading dimensions of the output: batch dimensions broadcast, then the query's heads (GQA keeps fewer keys)."""
    rank = query.dim() - 2
    if rank == 0:
        return []
    batch = broadcast(query.shape[: rank - 1], key.shape[: key.dim() - 3], value.shape[: value.dim() - 3])
    return [*batch, query.shape[rank - 1]]


def _four(x: Tensor, lead: list[int]) -> Tensor:
    """[*batch, heads, length, width] as [B, heads, length, width] for the batch of `lead`."""
    if len(lead) == 2 and x.dim() == 4 and x.shape[0] == lead[0]:
        return x
    if not lead:
        return x[None, None]
    heads = x.shape[-3] if x.dim() > 2 else 1
    x = x.expand(*lead[:-1], heads, *x.shape[-2:])
    return x.reshape(math.prod(lead[:-1]), heads, *x.shape[-2:])


def _four_mask(x: Tensor, lead: list[int]) -> Tensor:
    """A mask or bias, broadcastable to [*lead, M, N], with four dimensions, broadcast ones kept at 1."""
    while x.dim() < len(lead) + 2:
        x = x[None]
    if len(lead) == 2:
        return x
    if not lead:
        return x[None, None]
    batch = x.shape[: len(lead) - 1]
    if all(size == 1 for size in batch):
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*lead[:-1], *x.shape[-3:]).reshape(math.prod(lead[:-1]), *x.shape[-3:])


def sus_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    c: float | Tensor = 30.0,
    sampler: Sampler = "auto",
    seed: int | Tensor | None = None,
    forward: Forward = "auto",
    state: int = 0,
) -> Tensor:
    """F.scaled_dot_product_attention with a SUS backward (arXiv 2505.15080): same forward, sparse unbiased gradients.

    Args:
        query: [..., H, M, D] of float64, float32, bfloat16 or float16; also [M, D].
        key: [..., G, N, D]; G equals H unless `enable_gqa`.
        value: [..., G, N, E].
        attn_mask: bool (True takes part) or float (added to the logits), broadcastable to [..., H, M, N]. A float mask
            that requires a gradient gets one.
        dropout_p: probability in [0, 1) that a weight is dropped; dropped weights are dropped in the backward too.
        is_causal: row i sees keys 0 .. i (top-left, as F.scaled_dot_product_attention has it).
        scale: factor on query @ key^T; None is 1 / sqrt(D).
        enable_gqa: let G be a divisor of H; query head h uses key head h // (H / G). Nothing is repeated in memory.
        query_ids: int32 or int64 [M] or [..., M] (without heads), numbers of documents that are packed into one
            sequence: a query sees keys of its own number only. Where numbers ascend, pairs of different documents
            cost no time.
        key_ids: [N] or [..., N]; None is `query_ids`.
        c: expected number of kept entries per row, above 0: entry j of row i is kept with probability
            min(1, c * W_ij). `float("inf")` is the exact backward. A 0-dim tensor, on the query's device or the CPU, is
            read when the call runs.
        sampler: "systematic" (one draw per row), "independent" (one per entry, as in the paper), "tile" (whole tiles
            of 64 rows and 64 keys, each kept with a probability in proportion to its weight: for a GPU) or "auto"
            ("tile" on a GPU, else "systematic").
        seed: fixes the draws, an int of 64 bits or such a tensor; None draws anew in each call, following
            `torch.manual_seed` without use of the global generator.
        forward: "auto", or "library" to keep the bits of PyTorch's own kernel where another forward would be faster.
        state: number (`id`) of the `fx_passes.state.State` that counts the kept entries; 0 is none.

    Inside of forward-mode AD and of the transforms of torch.func (grad, jacrev, vmap, jvp) gradients are exact. What
    gradients of gradients add is exact too, at the first gradient's own draw.

    Returns:
        [..., H, M, E] in the query's dtype. A row that sees no key is zero and gets zero gradients.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it, what was given and what is allowed.

    Examples:
        >>> import torch
        >>> q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
        >>> sus_attention(q, k, v, is_causal=True, c=8).sum().backward()
        >>> q.grad.shape
        torch.Size([1, 2, 64, 16])
    """
    check_arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, sampler, forward)
    query_ids, key_ids = as_ids(query, key, query_ids, key_ids)
    state = check_state(state)
    c_tensor = as_c(c, query)
    here = query.to_local() if is_dtensor(query) else query  # type: ignore[attr-defined]
    seed_tensor = draw(here, _default_state.id, [])[1] if seed is None else as_seed(seed, query)
    own_masks, keeps_result = False, True
    wants_grad = any(x is not None and x.requires_grad for x in (query, key, value, attn_mask))
    if wants_grad and torch.is_grad_enabled() and why_left(query, key, value, attn_mask) is None:
        query, key, attn_mask, own_masks, keeps_result = as_library_keeps(
            query, key, value, attn_mask, float(dropout_p), is_causal, scale, enable_gqa
        )
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    result: Tensor = attend(
        query,
        key,
        value,
        c_tensor,
        seed_tensor,
        attn_mask=attn_mask if is_bool else None,
        attn_bias=None if is_bool else attn_mask,
        query_ids=query_ids,
        key_ids=key_ids,
        scale=scale,
        right=0 if is_causal else None,
        dropout_p=float(dropout_p),
        sampler=sampler,
        forward=forward,
        state=state,
        own_masks=own_masks,
    )
    return as_library_returns(result, query, keeps_result)


__all__ = ["attend", "attend_logits", "check_choice", "draw", "sus_attention"]
