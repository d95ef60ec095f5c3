"""Numbers of documents: a query sees keys of its own number only. All in memory that is linear in the length."""

from __future__ import annotations

import torch
from torch import Tensor

Ids = tuple[Tensor, Tensor]  # [B or 1, M] and [B or 1, N], int64


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


def _ranks(query: Tensor, key: Tensor) -> Ids:
    """Numbers from 0 to M + N - 1 in their order."""
    batch = max(query.shape[0], key.shape[0])
    query, key = query.expand(batch, -1).long(), key.expand(batch, -1).long()
    ordered = torch.cat([query, key], -1).sort(-1).values
    return torch.searchsorted(ordered, query.contiguous()), torch.searchsorted(ordered, key.contiguous())
