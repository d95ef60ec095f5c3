"""Numbers of documents: a query sees keys of its own number only. All in memory that is linear in the length."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_passes.state import shown

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
        raise TypeError(f"{name} must be a tensor of int32 or int64 or None, but it is {shown(ids)}")
    if ids.is_nested or ids.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, but it is {'nested' if ids.is_nested else ids.layout}")
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


class WrongEnds(ValueError):
    """What is said to be the ends of documents is not; the message names the argument."""


def check_ends(name: str, ends: Any, total: int, dtypes: tuple[torch.dtype, ...] = (torch.int32,)) -> Tensor:
    """The documents' ends and a 0 before, [documents + 1], of `total` places.

    Values are looked at on a CPU alone, of a graph when it runs: on a GPU that would wait for the device.

    Raises:
        WrongEnds: the argument, what was given and what is allowed.
    """
    if not isinstance(ends, Tensor) or ends.layout != torch.strided or ends.is_nested or ends.dtype not in dtypes:
        given = f"of {ends.dtype}" if isinstance(ends, Tensor) and ends.dtype not in dtypes else shown(ends)
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise WrongEnds(f"{name} must be a dense tensor of {wanted}, but it is {given}")
    if ends.dim() != 1 or ends.shape[0] < 2:
        raise WrongEnds(f"{name} must be of shape [documents + 1], but it is {tuple(ends.shape)}")
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() or type(ends) is not Tensor:
        checked: Tensor = _checked_ends(ends, total, name)
        return checked
    _check_values(name, ends, total)
    return ends


def _check_values(name: str, ends: Tensor, total: int) -> None:
    if ends.device.type != "cpu":
        return
    values = ends.tolist()
    if values[0] != 0 or values[-1] > total or any(a > b for a, b in itertools.pairwise(values)):
        raise WrongEnds(
            f"{name} must begin with 0, never descend and end with at most {total}, the number of places, but it is "
            f"{shown(values)}"
        )


@torch.library.custom_op("sus::checked_ends", mutates_args=())
def _checked_ends(ends: Tensor, total: int, name: str) -> Tensor:
    _check_values(name, ends, total)
    return ends.clone()


@_checked_ends.register_fake
def _(ends: Tensor, total: int, name: str) -> Tensor:
    return torch.empty_like(ends)


def ids_of_lengths(cumulative: Tensor, total: int) -> Tensor:
    """[1, total]: the number of the document of each place, for the documents' ends and a 0 before: [documents + 1]."""
    places = torch.arange(total, device=cumulative.device)
    return torch.searchsorted(cumulative[1:].contiguous(), places.to(cumulative.dtype), right=True)[None]


def ids_of_positions(position_ids: Tensor) -> Tensor:
    """[B, N]: the number of the document of each place, for positions [B, N] that restart with each document."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)


@dataclass(frozen=True)
class SharedPlaces:
    """Places in one sequence of M + N for queries and keys whose documents have other lengths.

    Each document has room for the longer of its two parts, and both begin (or end) together: what counts from there,
    such as a causal mask, is the same distance for all documents. Places without a query or a key see nothing.

    Attributes:
        query, key: places of the queries, int64 [M], and of the keys, [N].
        query_ids, key_ids: numbers of documents, int64 [1, M + N]. They ascend.
    """

    query: Tensor
    key: Tensor
    query_ids: Tensor
    key_ids: Tensor

    @property
    def length(self) -> int:
        return self.query_ids.shape[1]

    def spread(self, x: Tensor, places: Tensor) -> Tensor:
        """[B, H, M or N, D] to [B, H, M + N, D], zero where there is none."""
        return x.new_zeros((*x.shape[:2], self.length, x.shape[3])).index_copy(2, places, x)


def shared_places(query_ends: Tensor, key_ends: Tensor, m: int, n: int, from_end: bool) -> SharedPlaces:
    """For the documents' ends and a 0 before, [documents + 1], of M queries and N keys."""
    begins = torch.maximum(query_ends.diff(), key_ends.diff()).long().cumsum(0)
    begins = torch.cat([begins.new_zeros(1), begins])
    query, query_document = _places(query_ends, begins, m, from_end)
    key, key_document = _places(key_ends, begins, n, from_end)
    documents = ids_of_lengths(begins, m + n)[0]
    # Of three numbers for each document one is for what is there; others, in their order, are empty places.
    real, no_key, no_query = (2, 0, 1) if from_end else (0, 1, 2)
    query_ids = (3 * documents + no_query).index_copy(0, query, 3 * query_document + real)
    key_ids = (3 * documents + no_key).index_copy(0, key, 3 * key_document + real)
    return SharedPlaces(query, key, query_ids[None], key_ids[None])


def _places(ends: Tensor, begins: Tensor, total: int, from_end: bool) -> Ids:
    """Places of `total` rows, and their documents, in documents that begin at `begins`."""
    document = ids_of_lengths(ends, total)[0]
    edge = (document + 1).clamp(max=ends.shape[0] - 1) if from_end else document
    return torch.arange(total, device=ends.device) + begins[edge] - ends[edge], document


def _ranks(query: Tensor, key: Tensor) -> Ids:
    """Numbers from 0 to M + N - 1 in their order."""
    batch = max(query.shape[0], key.shape[0])
    query, key = query.expand(batch, -1).long(), key.expand(batch, -1).long()
    ordered = torch.cat([query, key], -1).sort(-1).values
    return torch.searchsorted(ordered, query.contiguous()), torch.searchsorted(ordered, key.contiguous())
