"""Numbers of documents: a query sees keys of its own number only. All in memory that is linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor]  # [B or 1, M] and [B or 1, N], int64


def as_ids(query: Tensor, key: Tensor, query_ids: Tensor | None, key_ids: Tensor | None) -> Ids | tuple[None, None]:
    """The numbers that a caller gave, checked, as the operator takes them. See `sus_attention`.

    Raises:
        TypeError, ValueError: the argument, what was given and what is allowed.
    """
    if query_ids is None:
        if key_ids is not None:
            raise ValueError("key_ids need query_ids beside them, but query_ids is None")
        return None, None
    if key_ids is None:
        if query.shape[-2] != key.shape[-2]:
            raise ValueError(
                f"key_ids may be None only for as many keys as queries, but there are {key.shape[-2]} keys and "
                f"{query.shape[-2]} queries"
            )
        key_ids = query_ids
    return _as_ids("query_ids", query_ids, query), _as_ids("key_ids", key_ids, key)


def _as_ids(name: str, ids: object, x: Tensor) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"{name} must be a tensor of int32 or int64 or None, but it is {ids!r}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be of int32 or int64, but it is of {ids.dtype}")
    if ids.device != x.device:
        raise ValueError(f"{name} must be on the query's device {x.device}, but it is on {ids.device}")
    batch, length = x.shape[:-3], x.shape[-2]
    sizes = zip(ids.shape[-2::-1], batch[::-1])  # noqa: B905 - Dynamo of torch 2.8 takes strict=False for True
    fits = 1 <= ids.dim() <= len(batch) + 1 and all(size in (1, wanted) for size, wanted in sizes)
    if not fits or ids.shape[-1] != length:
        raise ValueError(
            f"{name} must be of shape [{length}] or {[*batch, length]} (1 where it is broadcast), but it is "
            f"{tuple(ids.shape)}"
        )
    return ids.reshape(1, length) if ids.numel() == length else ids.expand(*batch, length).reshape(-1, length)


def both_ids(first_query: Tensor, first_key: Tensor, second_query: Tensor, second_key: Tensor) -> Ids:
    """Numbers that are equal where both pairs of numbers are."""
    query, key = _ranks(first_query, first_key)
    more_query, more_key = _ranks(second_query, second_key)
    base = second_query.shape[-1] + second_key.shape[-1]
    return query * base + more_query, key * base + more_key


def only_rows(query_ids: Tensor, key_ids: Tensor, rows: Tensor) -> Tensor:
    """Query numbers with one that no key has where `rows`, bool [B or 1, M], is False."""
    return torch.where(rows, query_ids, key_ids.min() - 1)


def ids_of_lengths(cumulative: Tensor, total: int) -> Tensor:
    """[1, total]: the number of the document of each place, for the documents' ends and a 0 before: [documents + 1]."""
    places = torch.arange(total, device=cumulative.device)
    return torch.searchsorted(cumulative[1:].contiguous(), places.to(cumulative.dtype), right=True)[None]


def ids_of_positions(position_ids: Tensor) -> Tensor:
    """[B, N]: the number of the document of each place, for positions [B, N] that restart with each document."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


def _ranks(query: Tensor, key: Tensor) -> Ids:
    """Numbers from 0 to M + N - 1 in their order."""
    batch = max(query.shape[0], key.shape[0])
    query, key = query.expand(batch, -1).long(), key.expand(batch, -1).long()
    ordered = torch.cat([query, key], -1).sort(-1).values
    return torch.searchsorted(ordered, query.contiguous()), torch.searchsorted(ordered, key.contiguous())
