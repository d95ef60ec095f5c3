"""Which tiles of keys the blocks of the sampler "tile" need not look at: other documents, and padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.problem import Problem
from fx_passes.ops.tile_rule import KEYS, ROWS, count


def _edges(ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest number in each `size` neighbours: [B, blocks]."""
    length = ids.shape[1]
    at = torch.arange(count(length, size) * size, device=ids.device).clamp(max=length - 1)
    parts = ids[:, at].view(ids.shape[0], -1, size)
    return parts.amin(-1), parts.amax(-1)


def ranges(problem: Problem) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """First tile, and one behind the last one, that each block can see by ids and key padding: int32 [B, blocks].

    Exact where ids ascend, as those of packed documents do.
    """
    b, blocks = problem.query.shape[0], count(problem.query.shape[2], ROWS)
    low: Tensor | None = None
    high: Tensor | None = None
    if problem.query_ids is not None and problem.key_ids is not None:
        smallest, largest = (x.expand(b, -1).contiguous() for x in _edges(problem.key_ids, KEYS))
        first, last = (x.expand(b, -1).contiguous() for x in _edges(problem.query_ids, ROWS))
        low = torch.searchsorted(largest.cummax(1).values, first)
        high = torch.searchsorted(smallest.flip(1).cummin(1).values.flip(1).contiguous(), last, right=True)
    mask = problem.attn_mask
    if mask is not None and mask.shape[1] == 1 and mask.shape[2] == 1 and mask.shape[3] > 1:
        parts = torch.nn.functional.pad(mask[:, 0, 0], (0, -mask.shape[3] % KEYS))
        parts = parts.view(mask.shape[0], -1, KEYS)
        seen, tile = parts.any(-1), torch.arange(parts.shape[1], device=mask.device)
        begin = torch.where(seen, tile, parts.shape[1]).amin(1, keepdim=True)
        end = torch.where(seen, tile + 1, 0).amax(1, keepdim=True)
        low = begin.expand(b, blocks) if low is None else torch.maximum(low, begin)
        high = end.expand(b, blocks) if high is None else torch.minimum(high, end)
    if low is None or high is None:
        return None, None
    return low.to(torch.int32).contiguous(), high.to(torch.int32).contiguous()
