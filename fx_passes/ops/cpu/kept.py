"""The kept entries behind the one visible byte of the operator's `kept` output.

The tensor is uint8 [1], but its storage goes on: a header, then the entries in compressed rows. Whoever copies the
tensor copies one byte and loses them; the backward then draws the same entries again (`unpack` returns None).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fx_passes.ops.problem import Problem

_MAGIC = 0x5355534B45505401
_HEADER = 64  # bytes; int64 words: magic, rows, count, seed, bits of c, site


def _header(problem: Problem, count: int, c: float, seed: int) -> Tensor:
    bits = torch.tensor(c, dtype=torch.float64).view(torch.int64).item()
    rows = problem.query.shape[:3].numel()
    return torch.tensor([_MAGIC, rows, count, seed, bits, problem.static.site, 0, 0], dtype=torch.int64)


def empty() -> Tensor:
    """A cache that holds nothing."""
    return torch.zeros(1, dtype=torch.uint8)


def _parts(buffer: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets int64 [rows + 1], keys int32 [count] and weights float32 [count] in a buffer."""
    ends = [_HEADER, _HEADER + 8 * (rows + 1), _HEADER + 8 * (rows + 1) + 4 * count]
    ends.append(ends[-1] + 4 * count)
    parts = [buffer[a:b] for a, b in pairwise(ends)]
    return parts[0].view(torch.int64), parts[1].view(torch.int32), parts[2].view(torch.float32)


def allocate(problem: Problem, count: int, c: float, seed: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The tensor to return from the operator, and the parts to fill."""
    header = _header(problem, count, c, seed)
    rows = int(header[1])
    buffer = torch.empty(_HEADER + 8 * (rows + 1) + 8 * count, dtype=torch.uint8)
    buffer[:_HEADER] = header.view(torch.uint8)
    return buffer[:1], _parts(buffer, rows, count)


def unpack(kept: Tensor, problem: Problem, c: float, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The parts, if the storage holds the entries of this very call."""
    size = kept.untyped_storage().nbytes()
    if size < _HEADER or kept.storage_offset() != 0:
        return None
    buffer = torch.empty(0, dtype=torch.uint8).set_(kept.untyped_storage())
    found = buffer[:_HEADER].view(torch.int64)
    rows, count = int(found[1]), int(found[2])
    if not torch.equal(found, _header(problem, count, c, seed)) or size < _HEADER + 8 * (rows + 1) + 8 * count:
        return None
    return _parts(buffer, rows, count)
