"""The kept entries behind the one visible byte of the operator's `kept` output.

The tensor is uint8 [1], but its storage goes on: a header, then the entries in compressed rows. Whoever copies the
tensor copies one byte and loses them; the backward then draws the same entries again (`unpack` returns None).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fx_passes.ops.problem import Problem

_MAGIC = 0x5355534B45505401
_HEADER = 64  # bytes; int64 words: magic, rows, count, seed, bits of c, site, seed and threshold of dropout


@dataclass(frozen=True)
class Draw:
    """What decides which entries are kept, and which of them dropout drops."""

    c: float
    seed: int
    dropout_seed: int = 0
    drop_below: int = 0


def _header(problem: Problem, count: int, draw: Draw) -> Tensor:
    bits = torch.tensor(draw.c, dtype=torch.float64).view(torch.int64).item()
    rows = problem.query.shape[:3].numel()
    drawn = (draw.seed, bits, problem.static.site, draw.dropout_seed, draw.drop_below)
    return torch.tensor([_MAGIC, rows, count, *drawn], dtype=torch.int64)


def empty() -> Tensor:
    """A cache that holds nothing."""
    return torch.zeros(1, dtype=torch.uint8)


@dataclass(frozen=True)
class Parts:
    """Views of a buffer: int64 [rows + 1], int32 [count], float32 [count]; float32 [B, H, M] where there are sinks."""

    offsets: Tensor
    keys: Tensor
    weights: Tensor  # negative where dropout drops the entry
    sinks: Tensor  # their weights in the softmax, whose gradient is exact


def _ends(problem: Problem, rows: int, count: int) -> list[int]:
    sizes = (_HEADER, 8 * (rows + 1), 4 * count, 4 * count, 0 if problem.sinks is None else 4 * rows)
    return list(accumulate(sizes))


def _parts(buffer: Tensor, problem: Problem, ends: list[int]) -> Parts:
    dtypes = (torch.int64, torch.int32, torch.float32, torch.float32)
    views = [buffer[a:b].view(dtype) for (a, b), dtype in zip(pairwise(ends), dtypes, strict=True)]
    if problem.sinks is not None:
        views[3] = views[3].view(problem.query.shape[:3])
    return Parts(*views)


def allocate(problem: Problem, count: int, draw: Draw) -> tuple[Tensor, Parts]:
    """The tensor to return from the operator, and the parts to fill."""
    header = _header(problem, count, draw)
    ends = _ends(problem, int(header[1]), count)
    buffer = torch.empty(ends[-1], dtype=torch.uint8)
    buffer[:_HEADER] = header.view(torch.uint8)
    return buffer[:1], _parts(buffer, problem, ends)


def unpack(kept: Tensor, problem: Problem, draw: Draw) -> Parts | None:
    """The parts, if the storage holds the entries of this very call."""
    size = kept.untyped_storage().nbytes()
    if size < _HEADER or kept.storage_offset() != 0:
        return None
    buffer = torch.empty(0, dtype=torch.uint8).set_(kept.untyped_storage())
    found = buffer[:_HEADER].view(torch.int64)
    rows, count = int(found[1]), int(found[2])
    if not torch.equal(found, _header(problem, count, draw)):
        return None
    ends = _ends(problem, rows, count)
    return _parts(buffer, problem, ends) if ends[-1] <= size else None
