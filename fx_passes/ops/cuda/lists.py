"""The rows' lists of points: their capacity, and how they hide behind the one byte that the operator returns.

Point h of a row has 16 bytes: its tile of keys (and which of its row's points in that tile it is), its rank among the
points of its block of rows in that tile, its place in the tile, and the tile's length. See `select`.

The block sampler has a list per block of rows: 8 bytes for a key and its 1 / q. See `block.block_select`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.ops.cuda.support import LARGEST_CAPACITY
from fx_passes.ops.problem import Problem
from fx_passes.ops.tiled.block import ROWS

_HEADER = 16  # bytes before the lists; the operator returns the first one
# A list must hold every point whatever rounding does. The float32 total of a row is off by tiles * 2^-24 at most, hence
# by 0.4% at the largest number of tiles, 65536, and so is the sum of its masses.
_SLACK = 1.005


def c_limit(capacity: int) -> float:
    """The largest c whose points fit. A larger one on the device becomes this one: less is kept, still unbiased."""
    return capacity / _SLACK  # points c and a start below 1: at most floor(c * _SLACK + start) of them


@dataclass(frozen=True)
class Lists:
    """Views of one buffer. `tile` is -1 where a slot has no point.

    Attributes:
        buffer: uint8, all of it.
        tile, rank, place: int32 [rows * capacity]; units: float32 [rows * capacity].
        capacity: slots per row.
    """

    buffer: Tensor
    tile: Tensor
    rank: Tensor
    place: Tensor
    units: Tensor
    capacity: int


@dataclass(frozen=True)
class BlockLists:
    """Views of one buffer.

    Attributes:
        buffer: uint8, all of it.
        found: int32 [B, H, blocks, capacity], the keys of each block of rows; inverse: float32, 1 / q of each.
        counts: int32 [B, H, blocks], how many slots are in use.
        capacity: slots per block.
    """

    buffer: Tensor
    found: Tensor
    inverse: Tensor
    counts: Tensor
    capacity: int


def capacity_for(problem: Problem, c: float) -> int | None:
    """Slots per row (or block) for c; None where lists do not pay, and infinity is not for lists at all."""
    if math.isinf(c) or c > LARGEST_CAPACITY[problem.static.sampler]:
        return None
    return math.ceil(c * _SLACK)


def _layout(problem: Problem) -> tuple[int, int, int]:
    """How many lists there are, 4-byte words per slot, and words of counts behind the slots."""
    b, h, m, _ = problem.query.shape
    if problem.static.sampler == "block":
        blocks = b * h * -(-m // ROWS)
        return blocks, 2, blocks
    return b * h * m, 4, 0


def _views(buffer: Tensor, problem: Problem, capacity: int) -> Lists | BlockLists:
    lists, words, _ = _layout(problem)
    data = buffer[_HEADER:].view(torch.int32)
    parts = data[: words * lists * capacity].view(words, -1)
    if problem.static.sampler == "block":
        shape = (*problem.query.shape[:2], -1)
        found, inverse = (x.view(*shape, capacity) for x in parts)
        return BlockLists(buffer, found, inverse.view(torch.float32), data[parts.numel() :].view(shape), capacity)
    tile, rank, place, units = parts
    return Lists(buffer, tile, rank, place, units.view(torch.float32), capacity)


def new_lists(problem: Problem, capacity: int) -> Lists | BlockLists:
    """Empty lists for the problem's sampler."""
    lists, words, counts = _layout(problem)
    size = _HEADER + 4 * (words * lists * capacity + counts)
    made = _views(torch.empty(size, dtype=torch.uint8, device=problem.query.device), problem, capacity)
    if isinstance(made, Lists):
        made.tile.fill_(-1)
    else:
        made.found.zero_()  # the kernels write the slots in use, and who indexes by the others must find a key
    return made


def find_lists(kept: Tensor, problem: Problem) -> Lists | BlockLists | None:
    """The lists behind the operator's byte, or None where it was copied and they are lost."""
    storage = kept.untyped_storage()
    lists, words, counts = _layout(problem)
    capacity, rest = divmod((storage.nbytes() - _HEADER) // 4 - counts, words * lists)
    if kept.storage_offset() or rest or capacity <= 0:
        return None
    buffer = torch.empty(0, dtype=torch.uint8, device=kept.device).set_(storage, 0, (storage.nbytes(),), (1,))
    return _views(buffer, problem, capacity)
