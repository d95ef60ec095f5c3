"""Tiles of the logits: which keys a block of rows sees, and their logits with everything that acts before softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fx_passes.ops.problem import Problem, Softmax

_ELEMENTS = 1 << 21  # of one tile over all heads and batch entries: a few temporaries of 8 MB each
CHUNK = 256  # key tiles start at multiples of it, see `sample.LANES`


@dataclass(frozen=True)
class Tile:
    """Logits of rows [row, row + m) and keys [key, key + n): [B, H, m, n], -inf where masked.

    `cap_slope` is the derivative of the softcap, or None. `visible` is None where no mask acts.
    """

    row: int
    key: int
    logits: Tensor
    cap_slope: Tensor | None
    visible: Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.logits.shape[2])

    @property
    def keys(self) -> slice:
        return slice(self.key, self.key + self.logits.shape[3])


def row_blocks(problem: Problem) -> Iterator[slice]:
    """Blocks of query rows: as many as make a tile of `_ELEMENTS` with up to 4096 keys."""
    b, h, m, _ = problem.query.shape
    n = problem.key.shape[2]
    size = max(16, min(512, _ELEMENTS // max(1, b * h * min(n, 4096))))
    for start in range(0, m if b * h else 0, size):
        yield slice(start, min(start + size, m))


def _key_range(problem: Problem, rows: slice) -> tuple[int, int]:
    s, n = problem.static, problem.key.shape[2]
    low = 0 if s.left is None or problem.prefix is not None else rows.start + problem.diagonal - s.left
    high = n if s.right is None else rows.stop + problem.diagonal + s.right
    if problem.prefix is not None and problem.prefix.numel():
        high = max(high, int(problem.prefix.max()))
    if problem.query_ids is not None and problem.key_ids is not None:
        first, last = _documents(problem.query_ids[:, rows], problem.key_ids)
        low, high = max(low, first), min(high, last)
    return max(0, low) // CHUNK * CHUNK, max(0, min(n, high))


def _documents(query_ids: Tensor, key_ids: Tensor) -> tuple[int, int]:
    """First key, and one behind the last one, whose number lies between those of the queries, in any batch entry."""
    least, most = query_ids.aminmax(dim=1, keepdim=True)
    near = ((key_ids >= least) & (key_ids <= most)).any(0).nonzero()
    return (int(near[0]), int(near[-1]) + 1) if len(near) else (0, 0)


def tiles(problem: Problem, rows: slice) -> Iterator[Tile]:
    """The tiles of one block of rows from left to right; keys that no row of the block sees are left out."""
    b, h = problem.query.shape[:2]
    low, high = _key_range(problem, rows)
    width = max(1, _ELEMENTS // max(1, b * h * (rows.stop - rows.start)) // CHUNK) * CHUNK
    for start in range(low, high, width):
        yield _tile(problem, rows, slice(start, min(start + width, high)))


def grouped(x: Tensor, group: int) -> Tensor:
    """[B, H, m, D] as [B, G, group * m, D]: the rows of the query heads that share a key head, one below the other."""
    b, h, m, d = x.shape
    return x.reshape(b, h // group, group * m, d)


def _tile(problem: Problem, rows: slice, keys: slice) -> Tile:
    s, dtype = problem.static, problem.accumulate_dtype
    b, h = problem.query.shape[:2]
    query = grouped(problem.query[:, :, rows].to(dtype), problem.group)
    key = problem.key[:, :, keys].to(dtype)
    logits = (query @ key.transpose(-2, -1)).view(b, h, rows.stop - rows.start, keys.stop - keys.start)
    logits = logits.mul_(s.scale)
    slope = None
    if s.softcap:
        tanh = logits.div_(s.softcap).tanh_()
        slope = 1 - tanh * tanh
        logits = tanh * s.softcap
    if problem.attn_bias is not None:
        logits = logits.add_(part(problem.attn_bias, rows, keys))
    visible = visible_keys(problem, rows, keys)
    if visible is not None:
        logits = logits.masked_fill_(~visible, -torch.inf)
    return Tile(rows.start, keys.start, logits, slope, visible)


def part(x: Tensor, rows: slice, keys: slice) -> Tensor:
    """Rows and keys of a tensor whose last two dimensions may be 1."""
    x = x[..., rows, :] if x.shape[-2] != 1 else x
    return x[..., keys] if x.shape[-1] != 1 else x


def visible_keys(problem: Problem, rows: slice, keys: slice) -> Tensor | None:
    """Which keys rows see, bool, broadcastable to [B, H, m, n]; None where they see all of them."""
    s, device = problem.static, problem.query.device
    first, last = rows.start + problem.diagonal, rows.stop - 1 + problem.diagonal
    band: Tensor | None = None
    inside_left = s.left is None or last - s.left <= keys.start
    inside_right = s.right is None or keys.stop - 1 <= first + s.right
    if not (inside_left and inside_right):
        place = torch.arange(first, last + 1, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        band = torch.ones((), dtype=torch.bool, device=device)
        if s.left is not None:
            band = band & (key >= place - s.left)
        if s.right is not None:
            band = band & (key <= place + s.right)
        if problem.prefix is not None:
            band = band | (key < problem.prefix.view(-1, 1, 1, 1))
    parts = [] if band is None else [band]
    if problem.query_ids is not None and problem.key_ids is not None:
        parts.append(problem.query_ids[:, None, rows, None] == problem.key_ids[:, None, None, keys])
    if problem.attn_mask is not None:
        parts.append(part(problem.attn_mask, rows, keys))
    if not parts:
        return None
    visible = parts[0]
    for other in parts[1:]:
        visible = visible & other
    return visible


def row_softmax(problem: Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Maximum and total of a block of rows, [B, H, m], sinks included."""
    b, h = problem.query.shape[:2]
    shape = (b, h, rows.stop - rows.start)
    maximum = problem.query.new_full(shape, -torch.inf, dtype=problem.accumulate_dtype)
    total = torch.zeros_like(maximum)
    if problem.sinks is not None:
        maximum = problem.sinks.to(maximum.dtype)[None, :, None].expand(shape).clone()
        total = torch.ones_like(maximum)
    for tile in tiles(problem, rows):
        new = torch.maximum(maximum, tile.logits.amax(-1))
        base = new.masked_fill(new == -torch.inf, 0)
        total = total * (maximum - base).exp() + tile.logits.sub_(base[..., None]).exp_().sum(-1)
        maximum = new
    empty = maximum == -torch.inf
    return maximum.masked_fill(empty, 0), total.masked_fill(empty, 1)


def weights(tile: Tile, softmax: Softmax) -> Tensor:
    """Attention weights W of a tile, [B, H, m, n]; it takes the memory of the tile's logits."""
    w = tile.logits.sub_(softmax.maximum[:, :, tile.rows, None]).exp_()
    return w.div_(softmax.total[:, :, tile.rows, None])


def dense_entries(problem: Problem) -> int:
    """Number of (row, key) pairs inside the band, over all heads and batch entries.

    Those of different documents do not count, as far as that is known without a wait for the device.
    """
    b, h, m, _ = problem.query.shape
    s, ids = problem.static, (problem.query_ids, problem.key_ids)
    if all(x is not None and x.device.type == "cpu" and bool((x[:, 1:] >= x[:, :-1]).all()) for x in ids):
        return h * _pairs_in_documents(problem)
    return b * h * _pairs_in_band(m, problem.key.shape[2], s.left, s.right, problem.diagonal)


def _pairs_in_documents(problem: Problem) -> int:
    """Of one head. The numbers ascend."""
    s, (b, _, m, _), n = problem.static, problem.query.shape, problem.key.shape[2]
    query_ids, key_ids = (x.long().expand(b, -1).contiguous() for x in (problem.query_ids, problem.key_ids))  # type: ignore[union-attr]
    low, high = (torch.searchsorted(key_ids, query_ids, right=right) for right in (False, True))
    place = torch.arange(m) + problem.diagonal
    # A prefix is visible whatever the band: as many keys as both hide are counted, which is an upper bound there.
    if problem.prefix is None:
        low = low if s.left is None else torch.maximum(low, (place - s.left).clamp(0, n))
        high = high if s.right is None else torch.minimum(high, (place + s.right + 1).clamp(0, n))
    return int((high - low).clamp(min=0).sum())


@lru_cache(maxsize=256)
def _pairs_in_band(m: int, n: int, left: int | None, right: int | None, diagonal: int) -> int:
    if left is None and right is None:
        return m * n
    place = torch.arange(m, dtype=torch.int64, device="cpu") + diagonal
    high = torch.full_like(place, n) if right is None else (place + right + 1).clamp(0, n)
    low = torch.zeros_like(place) if left is None else (place - left).clamp(0, n)
    return int((high - low).clamp(min=0).sum())
