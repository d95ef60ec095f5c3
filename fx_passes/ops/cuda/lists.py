"""The rows' lists of points: their capacity, and how they hide behind the one byte that the operator returns.

Point h of a row has 16 bytes: its tile of keys (and which of its row's points in that tile it is), its rank among the
points of its block of rows in that tile, its place in the tile, and the tile's length. See `select`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.ops.cuda.support import LARGEST_CAPACITY
from fx_passes.ops.problem import Problem

_HEADER = 16  # bytes before the lists; the operator returns the first one
_WORDS = 4  # of 4 bytes per slot
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


def capacity_for(c: float) -> int | None:
    """Slots per row for c; None where lists do not pay, and infinity is not for lists at all."""
    if math.isinf(c) or c > LARGEST_CAPACITY:
        return None
    return math.ceil(c * _SLACK)


def _views(buffer: Tensor, capacity: int) -> Lists:
    tile, rank, place, units = buffer[_HEADER:].view(torch.int32).view(_WORDS, -1)
    return Lists(buffer, tile, rank, place, units.view(torch.float32), capacity)


def new_lists(problem: Problem, capacity: int) -> Lists:
    """Empty lists."""
    size = _HEADER + 4 * _WORDS * problem.query.shape[:3].numel() * capacity
    made = _views(torch.empty(size, dtype=torch.uint8, device=problem.query.device), capacity)
    made.tile.fill_(-1)
    return made


def find_lists(kept: Tensor, problem: Problem) -> Lists | None:
    """The lists behind the operator's byte, or None where it was copied and they are lost."""
    storage = kept.untyped_storage()
    capacity, rest = divmod((storage.nbytes() - _HEADER) // 4, _WORDS * problem.query.shape[:3].numel())
    if kept.storage_offset() or rest or capacity <= 0:
        return None
    return _views(whole(kept), capacity)


def whole(kept: Tensor) -> Tensor:
    """All bytes of the storage of the operator's byte."""
    storage = kept.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=kept.device).set_(storage, 0, (storage.nbytes(),), (1,))
