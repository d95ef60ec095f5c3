"""`sus_attention`: the operator as a function, with the signature of F.scaled_dot_product_attention.

`attend` is the same for callers that have proven their arguments: the compiler pass emits it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import schema  # registers the operators
from fx_passes.ops.documents import as_ids
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.state import State, check_c, draw

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_default_state = State(float("inf"))


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
    sampler: str = "systematic",
    forward: str = "auto",
    site: int = 0,
    state: int = 0,
    return_lse: bool = False,
) -> Any:
    """Attention with a sparse backward; traceable by AOTAutograd. See `Problem` and `Static` for the arguments.

    Query, key and value may have any number of leading dimensions, as for F.scaled_dot_product_attention: they are
    broadcast, and all but the last of them are the batch. Masks and bias may have as many dimensions or fewer.

    Returns:
        [..., H, M, E]; with `return_lse` also the logsumexp of each row's logits, [..., H, M] in float32 (float64 for
        float64 inputs), with a gradient. It is 0 where a row sees no key.
    """
    query, key, value, attn_bias = _autocast(query, key, value, attn_bias)
    lead = _leading(query, key, value)
    query, key, value = (_four(x, lead) for x in (query, key, value))
    tensors = (query, key, value, attn_bias, sinks)
    dropout_seed = seed
    if dropout_p > 0:
        # From the global generator, as dropout draws everywhere: checkpointing restores it before a recomputation.
        dropout_seed = torch.randint(-(1 << 62), 1 << 62, (), device=query.device)
    out, maximum, total, _ = schema.attention(
        query,
        key,
        value,
        None if attn_mask is None else _four_mask(attn_mask, lead),
        None if attn_bias is None else _four_mask(attn_bias, lead),
        sinks,
        query_ids,
        key_ids,
        prefix,
        c,
        seed,
        dropout_seed,
        query.shape[-1] ** -0.5 if scale is None else scale,
        left,
        right,
        bottom_right,
        softcap,
        dropout_p,
        sampler,
        forward,
        torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors),
        site,
        state,
    )
    out = out.reshape(*lead, *out.shape[-2:]) if len(lead) != 2 else out
    if not return_lse:
        return out
    lse = maximum + total.log()
    return out, lse.reshape(*lead, lse.shape[-1]) if len(lead) != 2 else lse


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
    if not torch.is_autocast_enabled(device):
        return query, key, value, bias  # type: ignore[return-value]
    dtype = torch.get_autocast_dtype(device)
    cast = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value, bias)]
    return tuple(cast)  # type: ignore[arg-type]


def _leading(query: Tensor, key: Tensor, value: Tensor) -> list[int]:
    """Leading dimensions of the output: batch dimensions broadcast, then the query's heads (GQA keeps fewer keys)."""
    rank = query.dim() - 2
    if rank == 0:
        return []
    batch = _broadcast(query.shape[: rank - 1], key.shape[: key.dim() - 3], value.shape[: value.dim() - 3])
    return [*batch, query.shape[rank - 1]]


def _broadcast(*shapes: torch.Size) -> torch.Size:
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return, no-untyped-call]


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
    sampler: str = "systematic",
    seed: int | Tensor | None = None,
    forward: str = "auto",
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
            min(1, c * W_ij). `float("inf")` is the exact backward. A 0-dim tensor is read when the call runs.
        sampler: "systematic" (one draw per row), "independent" (one per entry, as in the paper) or "block" (64 rows
            share their keys, and c counts keys per block; not the paper's).
        seed: fixes the draws; None draws anew in each call, following `torch.manual_seed` without use of the global
            generator.
        forward: "auto", or "library" to keep the bits of PyTorch's own kernel where another forward would be faster.
        state: number of the `fx_passes.state.State` that counts the kept entries; 0 is none.

    Returns:
        [..., H, M, E] in the query's dtype. A row that sees no key is zero and gets zero gradients.

    Raises:
        TypeError, ValueError: the argument, what was given and what is allowed.

    >>> import torch
    >>> q, k, v = (torch.randn(1, 2, 64, 16, requires_grad=True) for _ in range(3))
    >>> sus_attention(q, k, v, is_causal=True, c=8).sum().backward()
    >>> q.grad.shape
    torch.Size([1, 2, 64, 16])
    """
    _check(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, sampler, forward)
    c_tensor = _c_tensor(c, query)
    seed = _default_state.next_seed() if seed is None else seed
    if not isinstance(seed, (int, Tensor)) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, a 0-dim int64 tensor or None, but it is {seed!r}")
    seed_tensor = seed if isinstance(seed, Tensor) else torch.tensor(_signed(seed), device=query.device)
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    query_ids, key_ids = as_ids(query, key, query_ids, key_ids)
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
        dropout_p=dropout_p,
        sampler=sampler,
        forward=forward,
        state=state,
    )
    return result


def _signed(seed: int) -> int:
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _c_tensor(c: float | Tensor, query: Tensor) -> Tensor:
    if not isinstance(c, Tensor):
        return torch.tensor(check_c(c), dtype=torch.float64, device=query.device)
    if c.dim() != 0:
        raise ValueError(f"c must be a number or a 0-dim tensor, but it is a tensor of shape {tuple(c.shape)}")
    if c.device.type == "cpu" and not torch.compiler.is_compiling():
        check_c(c)
    return c.to(torch.float64)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but it is {value!r}")


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    sampler: str,
    forward: str,
) -> None:
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("forward", forward, FORWARDS)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, but it is {x!r}")
        if x.dtype not in _FLOATS or x.dtype != query.dtype:
            allowed = "float64, float32, bfloat16 or float16, the same for query, key and value"
            raise TypeError(f"{name} must be {allowed}, but it is {x.dtype} (query is {query.dtype})")
        if x.dim() < 2 or x.dim() != query.dim():
            raise ValueError(
                f"{name} must have as many dimensions as query, at least 2, but it is {tuple(x.shape)} "
                f"and query is {tuple(query.shape)}"
            )
        if x.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, but it is on {x.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the query's head_dim {query.shape[-1]}, but it is {tuple(key.shape)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have as many keys as key, {key.shape[-2]}, but it is {tuple(value.shape)}")
    _check_heads(query, key, value, enable_gqa)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but it is {dropout_p}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite or None, but it is {scale}")
    if attn_mask is not None:
        _check_mask(query, key, attn_mask, is_causal)


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.dim() < 3:
        return
    heads, groups = query.shape[-3], key.shape[-3]
    if groups != value.shape[-3]:
        raise ValueError(f"value must have as many heads as key, {groups}, but it is {tuple(value.shape)}")
    if heads != groups and not (enable_gqa and groups > 0 and heads % groups == 0):
        allowed = f"a divisor of {heads}" if enable_gqa else f"{heads} (or set enable_gqa=True)"
        raise ValueError(f"the number of key heads must be {allowed}, but it is {groups}")
    try:
        _broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of query, key and value do not fit: {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        ) from None


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude one another: put the causal mask into attn_mask")
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, but it is {attn_mask!r}")
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _FLOATS:
        raise TypeError(f"attn_mask must be bool or floating point, but it is {attn_mask.dtype}")
    full = (*query.shape[:-1], key.shape[-2])
    if attn_mask.dim() > len(full) or any(
        size not in (1, target) for size, target in zip(attn_mask.shape[::-1], full[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask must be broadcastable to {full}, but it is {tuple(attn_mask.shape)}")


__all__ = ["attend", "attend_logits", "check_choice", "draw", "sus_attention"]
