"""The rule of the sampler "tile" in float64, dense and block by block; `fx_passes.ops.tile_rule` explains it."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.reference.dense import Dense

ROWS, KEYS, PROBED, FLOOR = 64, 64, 16, 0.1


def probed_rows(grad: Tensor) -> Tensor:
    """Rows of one block that are probed, int64 [<= PROBED]. `grad` is dO [<= ROWS, E]."""
    even = list(range(0, len(grad), 2 * ROWS // PROBED))
    size = grad.double().square().sum(-1)
    rest = sorted((i for i in range(len(grad)) if i not in even), key=lambda i: (-float(size[i]), i))
    return torch.tensor(even + rest[: PROBED // 2], device=grad.device)


def looked_at(problem: Dense, batch: int, rows: slice) -> Tensor:
    """Tiles from the first to the last that a block may see by its band, and by ids and key padding. Bool [tiles]."""
    n, count = problem.key.shape[2], -(-problem.key.shape[2] // KEYS)
    shift = n - problem.query.shape[2] if problem.bottom_right else 0
    i, j = torch.arange(rows.start, rows.stop)[:, None] + shift, torch.arange(n)[None]
    band = torch.ones(len(i), n, dtype=torch.bool)
    if problem.left is not None:
        band &= j >= i - problem.left
    if problem.right is not None:
        band &= j <= i + problem.right
    prefix = problem.prefix if problem.prefix is None else problem.prefix.expand(problem.query.shape[0])
    if prefix is not None:
        band |= j < int(prefix[batch])
    seen = _hull(_in_tiles(band.any(0), count).any(1))
    if problem.query_ids is not None and problem.key_ids is not None:
        mine = problem.query_ids.expand(problem.query.shape[0], -1)[batch, rows].cpu()
        ids = problem.key_ids.expand(problem.query.shape[0], -1)[batch].cpu()
        for t in range(count):
            seen[t] &= bool((ids[: (t + 1) * KEYS] >= mine.min()).any() and (ids[t * KEYS :] <= mine.max()).any())
    mask = problem.attn_mask
    if mask is not None and mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] > 1:
        keys = mask[batch if mask.shape[0] > 1 else 0, 0, 0].cpu()
        seen &= _hull(_in_tiles(keys, count).any(1))
    return seen


def _in_tiles(keys: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(keys, (0, count * KEYS - len(keys))).view(count, KEYS)


def _hull(seen: Tensor) -> Tensor:
    """True from the first to the last True."""
    at = seen.nonzero()
    result = torch.zeros_like(seen)
    if len(at):
        result[int(at[0]) : int(at[-1]) + 1] = True
    return result


def tile_draw(problem: Dense, grad: Tensor, c: float, words: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept, for given offsets of the blocks.

    Args:
        problem: the call.
        grad: dO [B, H, M, E].
        c: above 0, finite.
        words: int64 [B, H, blocks] in [0, 2^32).

    Returns:
        kept, bool [B, H, blocks, tiles]; q, float64, the same shape, 0 where a block does not look.
    """
    w = problem.weights(problem.logits())
    (b, h, m, n), count = w.shape, -(-w.shape[3] // KEYS)
    kept = torch.zeros(*words.shape, count, dtype=torch.bool)
    known = torch.zeros(kept.shape, dtype=torch.float64)
    for batch in range(b):
        for head in range(h):
            for block in range(words.shape[2]):
                rows = slice(block * ROWS, min((block + 1) * ROWS, m))
                probed = w[batch, head, rows][probed_rows(grad[batch, head, rows])].cpu()
                mass = torch.nn.functional.pad(probed, (0, count * KEYS - n)).view(-1, count, KEYS).sum(-1)
                sees = looked_at(problem, batch, rows)
                s = mass.square().mean(0).sqrt() + FLOOR / max(int(sees.sum()), 1)
                q = torch.where(sees, (c * s).clamp(max=1), 0.0)
                offset, total = int(words[batch, head, block]) / 2**32, q.cumsum(0)
                kept[batch, head, block] = torch.floor(total + offset) > torch.floor(total - q + offset)
                known[batch, head, block] = q
    return kept, known


def tile_multiplier(kept: Tensor, q: Tensor, m: int, n: int) -> Tensor:
    """1 / q for the entries of kept tiles, else 0: [B, H, M, N]."""
    inverse = torch.where(kept, 1 / q.clamp(min=2.0**-32), 0.0)
    return inverse.repeat_interleave(ROWS, 2).repeat_interleave(KEYS, 3)[:, :, :m, :n]
