"""Hugging Face transformers: SUS as an attention implementation, ``attn_implementation="sus"``, without a compiler.

`SUSTrainerCallback` (`fx_passes.huggingface_trainer`) trains any model of transformers' Trainer.

The masks of transformers are functions; those that are a band (causal, sliding window) are passed on as a band and the
padding of the batch as one row per sequence, so that no M x N mask is made. Any other mask function is evaluated, as
transformers' own "sdpa" does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fx_passes.handle import CallHandle
from fx_passes.ops.arguments import why_left
from fx_passes.ops.documents import check_ends, ids_of_lengths, ids_of_positions, shared_places
from fx_passes.ops.exact import exact_attention
from fx_passes.ops.functional import attend, draw
from fx_passes.ops.problem import Forward, Sampler

Band = tuple[int | None, int | None]
_ATTRIBUTE = "_sus_band"  # of a mask: the band (left, right) that holds besides it
_IDS = "_sus_documents"  # of a mask or of positions: the numbers of the documents, or None


def __getattr__(name: str) -> Any:
    if name == "SUSTrainerCallback":  # imported late: its base is a class of transformers
        from fx_passes.huggingface_trainer import SUSTrainerCallback

        return SUSTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class register_sus_attention(CallHandle):
    """Registers "sus" with transformers' AttentionInterface and AttentionMaskInterface, and is the handle to it.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
            The attribute `c` may be set at any time.
        sampler: as for `SUSBackend`.
        seed: as for `SUSBackend`.
        forward: as for `SUSBackend`.

    Calls that it cannot take (tensors without data, subclasses, other devices) are exact, and `report` counts them.

    Raises:
        ImportError: transformers is not installed.
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        After it, ``AutoModelForCausalLM.from_pretrained(path, attn_implementation="sus")`` trains with SUS.

        >>> sus = register_sus_attention(c=100)
        >>> sus.c = 50
    """

    def __init__(
        self, c: float = 30.0, sampler: Sampler = "auto", seed: int | None = None, forward: Forward = "auto"
    ) -> None:
        super().__init__(c, sampler, seed, forward)
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register("sus", self._attention)
        # Dynamo cannot look into the functions of which transformers makes a mask.
        AttentionMaskInterface.register("sus", torch._disable_dynamo(sus_mask))  # type: ignore[attr-defined]

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Signature and result of transformers' attention functions: [B, H, M, D] to [B, M, H, E]."""
        band, mask, bias = _masks(module, query, attention_mask, is_causal, position_bias)
        ids = _documents(query, key, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
        rows = None
        if ids[0] is not ids[1] and band != (None, None) and cu_seq_lens_q is not None and cu_seq_lens_k is not None:
            # As in flash-attn, the band of each document counts from its last query and its last key.
            shared = shared_places(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], key.shape[2], from_end=True)
            if mask is None and bias is None:
                rows, ids = shared.query, (shared.query_ids, shared.key_ids)
                query = shared.spread(query, shared.query)
                key, value = (shared.spread(x, shared.key) for x in (key, value))
            else:
                near = _in_band(shared.key - shared.query[:, None], band)
                mask, band = near if mask is None else mask & near, (None, None)
        reason = why_left(query, key, value, None, dropout, False, scaling, query.shape[1] != key.shape[1])
        if reason is not None:
            self.state.note_left(reason)
            scale = float(query.shape[-1] or 1) ** -0.5 if scaling is None else scaling
            out = exact_attention(
                query,
                key,
                value,
                mask,
                bias,
                s_aux,
                ids[0],
                ids[1],
                scale=scale,
                left=band[0],
                right=band[1],
                softcap=softcap or 0.0,
                dropout_p=dropout,
            )
            return _rows(out, rows), None
        if torch.is_grad_enabled():
            self.state.note_call()
        c, seed = draw(query, self.state.id, [0])
        out = attend(
            query,
            key,
            value,
            c[0],
            seed,
            attn_mask=mask,
            attn_bias=bias,
            sinks=s_aux,
            query_ids=ids[0],
            key_ids=ids[1],
            scale=scaling,
            left=band[0],
            right=band[1],
            softcap=softcap or 0.0,
            dropout_p=dropout,
            sampler=self.sampler,
            forward=self.forward,
            state=self.state.id,
        )
        return _rows(out, rows), None


def _rows(out: Tensor, rows: Tensor | None) -> Tensor:
    """[B, H, M, E] as transformers wants it; `rows` are those of the queries, where there are others."""
    return (out if rows is None else out.index_select(2, rows)).transpose(1, 2).contiguous()


def _in_band(distance: Tensor, band: Band) -> Tensor:
    """Bool [M, N] for the distances of keys after queries."""
    left, right = band
    near = torch.ones_like(distance, dtype=torch.bool) if right is None else distance <= right
    return near if left is None else near & (distance >= -left)


def _masks(
    module: nn.Module, query: Tensor, given: Tensor | None, is_causal: bool | None, position_bias: Tensor | None
) -> tuple[Band, Tensor | None, Tensor | None]:
    """Band, bool mask and float bias of a call."""
    band: Band = getattr(given, _ATTRIBUTE, (None, None))
    if given is None:  # no mask was made for this layer: transformers' convention for "sdpa"
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        band = (None, 0) if causal and query.shape[2] > 1 else (None, None)
    if given is None or given.dtype == torch.bool:
        return band, given, position_bias
    return band, None, given if position_bias is None else given + position_bias


def _documents(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Numbers of the documents that a batch packs: from their lengths, from the mask, or from positions that restart.

    As transformers' flash attention does, but for the mask; there, positions count in a batch of one entry only.
    """
    if cu_seq_lens_q is not None and query.shape[0] == 1:
        integers = (torch.int32, torch.int64)
        queries = keys = check_ends("cu_seq_lens_q", cu_seq_lens_q, query.shape[2], integers)
        if cu_seq_lens_k is not None and cu_seq_lens_k is not cu_seq_lens_q:
            keys = check_ends("cu_seq_lens_k", cu_seq_lens_k, key.shape[2], integers)
        query_ids = ids_of_lengths(queries, query.shape[2])
        same = keys is queries or (not torch.compiler.is_dynamo_compiling() and torch.equal(queries, keys))
        return query_ids, query_ids if same else ids_of_lengths(keys, key.shape[2])
    ids: Tensor | None = getattr(mask, _IDS, None)
    if ids is None and position_ids is not None and position_ids.shape == (1, query.shape[2]) == (1, key.shape[2]):
        ids = _restarts(position_ids) if query.shape[0] == 1 else None
    return (None, None) if ids is None else (ids, ids)


def _restarts(position_ids: Tensor) -> Tensor | None:
    """Numbers of documents, or None for a single one; remembered, for all layers get the same positions."""
    if torch.compiler.is_dynamo_compiling():
        return ids_of_positions(position_ids)  # to look at their values would break the graph
    if not hasattr(position_ids, _IDS):
        ids = ids_of_positions(position_ids)
        try:
            packed = bool((ids[:, -1] > 0).any())
        except RuntimeError:  # positions without data
            packed = True
        setattr(position_ids, _IDS, ids if packed else None)
    return getattr(position_ids, _IDS)  # type: ignore[no-any-return]


def sus_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **more: Any,
) -> Tensor:
    """The mask of a forward, as transformers' AttentionMaskInterface wants it.

    Returns:
        bool: the padding, [B or 1, 1, 1, N], where `mask_function` is a band that the attention applies by itself;
        else the whole mask, [B, 1, M, N].
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    band, documents = _band(function), _packed(function)
    if len(documents) > 1 or (_remapped(function) and not documents):
        band = None
    aligned = q_length == kv_length and isinstance(q_offset, int) and q_offset == kv_offset == 0
    if band is None or not aligned:
        more = {**more, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Tensor = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, function, attention_mask, **more)
        return mask
    if attention_mask is None:
        mask = torch.ones((1, 1, 1, kv_length), dtype=torch.bool, device=more.get("device", "cpu"))
    else:
        mask = attention_mask[:, None, None, :kv_length].bool()
    setattr(mask, _ATTRIBUTE, band)
    setattr(mask, _IDS, documents[0] if documents else None)
    return mask


def _band(function: Callable[..., Any]) -> Band | None:
    """The band of a mask function of transformers, or None where it is not known to be one."""
    from transformers import masking_utils as m

    if function is m.causal_mask_function:
        return None, 0
    if function is m.bidirectional_mask_function:
        return None, None
    inside = inspect.getclosurevars(function).nonlocals
    if function.__qualname__ == _qualname("packed_sequence_mask_function"):
        return None, None  # documents are no band: `_packed` has them
    if function.__qualname__ == _qualname("remap_positions_for_packed_sequence"):
        return _band(inside["mask_function"])  # within a document, distances of positions are those of places
    if function.__qualname__ == m.sliding_window_overlay(1).__qualname__:
        return inside["sliding_window"] - 1, None
    if function.__qualname__ == m.and_masks().__qualname__:
        bands = [_band(f) for f in inside["mask_functions"]]
        if any(b is None for b in bands):
            return None
        lefts, rights = ([b[i] for b in bands if b is not None and b[i] is not None] for i in (0, 1))
        return min(lefts, default=None), min(rights, default=None)  # type: ignore[type-var]
    return None


def _qualname(name: str) -> str | None:
    """The qualified name of the mask functions that a function of transformers.masking_utils makes."""
    from transformers import masking_utils as m

    return f"{name}.<locals>.inner_mask" if hasattr(m, name) else None


def _remapped(function: Callable[..., Any]) -> bool:
    """Whether a mask function looks at positions in place of places somewhere."""
    if function.__qualname__ == _qualname("remap_positions_for_packed_sequence"):
        return True
    inside = inspect.getclosurevars(function).nonlocals.get("mask_functions", ())
    return any(_remapped(f) for f in inside)


def _packed(function: Callable[..., Any]) -> list[Tensor]:
    """Numbers of documents [B, N] in a mask function, as far as it joins them with a band."""
    from transformers import masking_utils as m

    if function.__qualname__ == m.and_masks().__qualname__:
        return [ids for f in inspect.getclosurevars(function).nonlocals["mask_functions"] for ids in _packed(f)]
    if function.__qualname__ == _qualname("packed_sequence_mask_function"):
        return [inspect.getclosurevars(function).nonlocals["packed_sequence_mask"]]
    return []
