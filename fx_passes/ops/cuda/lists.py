"""The rows' lists of points: their capacity, and how they hide behind the one byte that the operator returns.

Point h of a row has 16 bytes: its tile of keys (and which of its row's points in that tile it is), its rank among the
points of its block of rows in that tile, its place in the tile, and the tile's length. See `select`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.ops.cuda.config import Config
from fx_passes.ops.cuda.support import LARGEST_CAPACITY
from fx_passes.ops.problem import Problem

_HEADER = 16  # bytes before the lists; the operator returns the first one
_SLACK = 1.002  # the masses of a row sum to 1 within 1e-4; a list must hold every point whatever their rounding


@dataclass(frozen=True)
class Lists:
    """Views of one buffer. `tile` is -1 where a slot has no point.

    Attributes:
        buffer: uint8, all of it.
        tile, rank, place: int32 [rows * capacity]; units: float32 [rows * capacity].
        counts: int32 [B, H, blocks, tiles], points of each block of rows in each tile.
        capacity: slots per row.
    """

    buffer: Tensor
    tile: Tensor
    rank: Tensor
    place: Tensor
    units: Tensor
    counts: Tensor
    capacity: int

    @property
    def c_limit(self) -> float:
        """The largest c whose points fit. A larger one on the device becomes this one: less is kept, still unbiased."""
        return (self.capacity - 1) / _SLACK


def capacity_for(c: float) -> int | None:
    """Slots per row for c; None where lists do not pay, and infinity is not for lists at all."""
    if math.isinf(c) or c > LARGEST_CAPACITY:
        return None
    return -(-math.ceil(c * _SLACK + 1) // 8) * 8


def _shape(problem: Problem, sizes: Config) -> tuple[int, int, int, int]:
    b, h, m, _ = problem.query.shape
    return b, h, -(-m // sizes.bm), -(-problem.key.shape[2] // sizes.sub)


def _views(buffer: Tensor, problem: Problem, sizes: Config, capacity: int) -> Lists:
    slots = problem.query.shape[:3].numel() * capacity
    words = buffer[_HEADER:].view(torch.int32)
    tile, rank, place, units = words[: 4 * slots].view(4, slots)
    counts = words[4 * slots :]
    return Lists(buffer, tile, rank, place, units.view(torch.float32), counts.view(_shape(problem, sizes)), capacity)


def new_lists(problem: Problem, sizes: Config, capacity: int) -> Lists:
    slots = problem.query.shape[:3].numel() * capacity
    size = _HEADER + 4 * (4 * slots + math.prod(_shape(problem, sizes)))
    lists = _views(torch.empty(size, dtype=torch.uint8, device=problem.query.device), problem, sizes, capacity)
    lists.tile.fill_(-1)
    lists.counts.zero_()
    return lists


def find_lists(kept: Tensor, problem: Problem, sizes: Config) -> Lists | None:
    """The lists behind the operator's byte, or None where it was copied and they are lost."""
    storage = kept.untyped_storage()
    rows = problem.query.shape[:3].numel()
    slots, rest = divmod((storage.nbytes() - _HEADER) // 4 - math.prod(_shape(problem, sizes)), 4 * rows)
    if kept.storage_offset() or rest or slots <= 0:
        return None
    buffer = torch.empty(0, dtype=torch.uint8, device=kept.device).set_(storage, 0, (storage.nbytes(),), (1,))
    return _views(buffer, problem, sizes, slots)
