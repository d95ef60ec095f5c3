"""The sampler "tile" on any device: whole tiles of 64 rows and 64 keys, with memory linear in the length.

`fx_passes.ops.tile_rule` has the rule. Two steps per block of rows: one pass over the logits for the weights of the
tiles, of which the probed rows count; then dense products over the tiles that were drawn, gathered one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fx_passes.ops.draws import STREAM_DROPOUT, STREAM_TILE, philox, row_words, stream_word
from fx_passes.ops.problem import Problem, Softmax, Upstream
from fx_passes.ops.tile_ranges import ranges
from fx_passes.ops.tile_rule import FLOOR, KEYS, ONE, PROBED, ROWS, count
from fx_passes.ops.tiled.sums import Sums, add_rows
from fx_passes.ops.tiled.tiles import tiles, weights

_ELEMENTS = 1 << 21  # numbers in the tiles that are treated together


def add_tiles(problem: Problem, upstream: Upstream, delta: Tensor, c: float, sums: Sums) -> int:
    """Adds the gradients of all row blocks to `sums`; returns the number of pairs used."""
    (b, h), grad, softmax = problem.query.shape[:2], upstream.grad, upstream.softmax
    used, heads = 0, torch.arange(b * h, device=grad.device).view(b, h, 1)
    for rows in _row_slices(problem):
        block = torch.arange(rows.start // ROWS, count(rows.stop, ROWS), device=grad.device)
        words = row_words(upstream.seed, problem.static.site, heads, block, STREAM_TILE)
        q = probabilities(_masses(problem, rows, softmax), probed_rows(grad[:, :, rows]), _sees(problem, rows), c)
        kept, inverse = choose(q, words)
        at = kept.nonzero()
        size = max(1, _ELEMENTS // (ROWS * KEYS))
        for part in torch.split(at, size):
            batch, head, of, tile = part.unbind(1)
            picked = _Picked(batch, head, of + rows.start // ROWS, tile, inverse[batch, head, of, tile])
            used += _add(problem, picked, upstream, delta, sums)
    return used


def _row_slices(problem: Problem) -> Iterator[slice]:
    """Rows that are treated together: whole blocks."""
    b, h, m, _ = problem.query.shape
    size = max(1, min(8, _ELEMENTS // max(1, b * h * min(problem.key.shape[2], 4096) * ROWS))) * ROWS
    for start in range(0, m if b * h else 0, size):
        yield slice(start, min(start + size, m))


def _blocks(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """[B, H, m, ...] as [B, H, blocks, size, ...], the last block padded."""
    short = -x.shape[2] % size
    x = pad(x, (0, 0) * (x.dim() - 3) + (0, short), value=value) if short else x
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def probed_rows(grad: Tensor) -> Tensor:
    """Which rows of each block are probed: bool [B, H, blocks, ROWS]. `grad` is dO [B, H, m, E] of whole blocks."""
    size = _blocks(grad.to(torch.float64 if grad.dtype == torch.float64 else torch.float32).square().sum(-1), ROWS, -2)
    size = size.nan_to_num(torch.inf)
    even = torch.arange(ROWS, device=grad.device) % (2 * ROWS // PROBED) == 0
    largest = size.masked_fill(even, -1).sort(dim=-1, descending=True, stable=True).indices[..., : PROBED // 2]
    return (even.expand(size.shape) | torch.zeros_like(size, dtype=torch.bool).scatter(-1, largest, True)) & (size > -2)


def _masses(problem: Problem, rows: slice, softmax: Softmax) -> Tensor:
    """M: the weight of every row of every block in every tile of keys, [B, H, blocks, ROWS, tiles]."""
    blocks = count(rows.stop - rows.start, ROWS)
    shape = (*problem.query.shape[:2], blocks, ROWS, count(problem.key.shape[2], KEYS))
    mass = softmax.maximum.new_zeros(shape)
    for tile in tiles(problem, rows):
        w = _blocks(weights(tile, softmax), ROWS)
        w = pad(w, (0, -w.shape[-1] % KEYS))
        first = tile.key // KEYS
        mass[..., first : first + w.shape[-1] // KEYS] = w.view(*w.shape[:4], -1, KEYS).sum(-1)
    return mass


def _sees(problem: Problem, rows: slice) -> Tensor:
    """Tiles that a block looks at, bool [B or 1, 1, blocks, tiles]: by band and prefix, and by `tile_ranges`."""
    s, n, device = problem.static, problem.key.shape[2], problem.query.device
    first = torch.arange(rows.start, rows.stop, ROWS, device=device)
    last = (first + ROWS).clamp(max=problem.query.shape[2]) - 1
    tile = torch.arange(count(n, KEYS), device=device)
    low, high = torch.zeros_like(first)[None], torch.full_like(first, n)[None]
    if s.right is not None:
        high = (last + problem.diagonal + s.right + 1).clamp(0, n)[None]
    if problem.prefix is not None:
        high = torch.maximum(high, problem.prefix.to(high.dtype).clamp(max=n).view(-1, 1))
    elif s.left is not None:
        low = (first + problem.diagonal - s.left).clamp(min=0)[None]
    low, high = low // KEYS, -(-high // KEYS)
    from_, to = ranges(problem)
    if from_ is not None and to is not None:
        blocks = slice(rows.start // ROWS, count(rows.stop, ROWS))
        low, high = torch.maximum(low, from_[:, blocks]), torch.minimum(high, to[:, blocks])
    return ((tile >= low[..., None]) & (tile < high[..., None]))[:, None]


def probabilities(mass: Tensor, probed: Tensor, sees: Tensor, c: float) -> Tensor:
    """q of every block and tile [B, H, blocks, tiles], 0 where the block does not look.

    Args:
        mass: M [B, H, blocks, ROWS, tiles]; probed: bool [B, H, blocks, ROWS]; sees: bool, broadcast over q.
    """
    squares = (mass * probed[..., None]).square().sum(3) / probed.sum(3).clamp(min=1)[..., None]
    floor = FLOOR / sees.sum(-1, keepdim=True).clamp(min=1)
    # Not-a-number keeps the tile, so that a diverged run shows it.
    return (c * (squares.sqrt() + floor)).nan_to_num(1).clamp(max=1) * sees


def choose(q: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Points at distance 1 on the cumulative q from a random start: which tiles hold one, and 1 / q as it was used.

    Args:
        q: [B, H, blocks, tiles].
        words: one in [0, 2^32) per block, int64 [B, H, blocks].
    """
    units = torch.where(q > 0, (q.double() * ONE).long().clamp(min=1), 0)
    ends = units.cumsum(-1) + words[..., None]
    return (ends >> 32) > ((ends - units) >> 32), ONE / units.double()


@dataclass(frozen=True)
class _Picked:
    """Some of the kept tiles, each an int64 [K]: batch, query head, row block, key tile; and 1 / q, float64 [K]."""

    batch: Tensor
    head: Tensor
    block: Tensor
    tile: Tensor
    inverse: Tensor

    def rows(self) -> Tensor:
        return self.block[:, None] * ROWS + torch.arange(ROWS, device=self.block.device)

    def keys(self) -> Tensor:
        return self.tile[:, None] * KEYS + torch.arange(KEYS, device=self.tile.device)


def _add(problem: Problem, at: _Picked, upstream: Upstream, delta: Tensor, sums: Sums) -> int:
    """Adds the gradients of the picked tiles; returns their number of pairs in the band."""
    s, dtype, (m, n) = problem.static, sums.query.dtype, (problem.query.shape[2], problem.key.shape[2])
    rows, keys = at.rows(), at.keys()
    row, key = rows.clamp(max=m - 1), keys.clamp(max=n - 1)
    batch, head, key_head = at.batch[:, None], at.head[:, None], at.head[:, None] // problem.group
    query, grad_rows = problem.query[batch, head, row].to(dtype), upstream.grad[batch, head, row].to(dtype)
    keys_of, values_of = problem.key[batch, key_head, key].to(dtype), problem.value[batch, key_head, key].to(dtype)
    logits = query @ keys_of.mT * s.scale
    slope = None
    if s.softcap:
        tanh = (logits / s.softcap).tanh()
        logits, slope = tanh * s.softcap, 1 - tanh * tanh
    place = (batch[..., None], head[..., None], row[:, :, None], key[:, None, :])
    if problem.attn_bias is not None:
        logits = logits + problem.attn_bias[_at(problem.attn_bias, place)]
    band, visible = _visible(problem, at, rows[:, :, None], keys[:, None, :], place)
    top, total = (x[batch, head, row][..., None] for x in (upstream.softmax.maximum, upstream.softmax.total))
    weight = (logits.masked_fill(~visible, -torch.inf) - top).exp() / total * at.inverse.to(dtype)[:, None, None]
    weight = weight.masked_fill((rows >= m)[..., None], 0)
    grad_w, used = grad_rows @ values_of.mT, weight
    if s.dropout_p:
        factor = _dropout(problem, upstream.dropout_seed, at, rows).to(dtype)
        grad_w, used = grad_w * factor, weight * factor
    grad_logits = weight * (grad_w - delta[batch, head, row][..., None])
    if sums.bias is not None:
        sums.bias.index_put_(_at(sums.bias, place), grad_logits, accumulate=True)
    if slope is not None:
        grad_logits = grad_logits * slope
    add_rows(sums.value, batch, key_head, key, used.mT @ grad_rows)
    add_rows(sums.query, batch, head, row, grad_logits @ keys_of * s.scale)
    add_rows(sums.key, batch, key_head, key, grad_logits.mT @ query * s.scale)
    return int(band.sum())


def _at(x: Tensor, place: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Indices of a broadcast mask or bias."""
    return tuple(torch.zeros_like(i) if size == 1 else i for i, size in zip(place, x.shape, strict=True))


def _visible(
    problem: Problem, at: _Picked, rows: Tensor, keys: Tensor, place: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Pairs in the band, and those that are visible, of rows [K, ROWS, 1] and keys [K, 1, KEYS]."""
    s, i = problem.static, rows + problem.diagonal
    band = (rows < problem.query.shape[2]) & (keys < problem.key.shape[2])
    there = band
    if s.left is not None:
        band = band & (keys >= i - s.left)
    if s.right is not None:
        band = band & (keys <= i + s.right)
    visible = band
    if problem.prefix is not None:
        prefix = problem.prefix.expand(problem.query.shape[0])[at.batch].view(-1, 1, 1)
        visible = there & (band | (keys < prefix))
    if problem.query_ids is not None and problem.key_ids is not None:
        query_ids, key_ids = (x.expand(problem.query.shape[0], -1) for x in (problem.query_ids, problem.key_ids))
        visible = visible & (query_ids[place[0], place[2]] == key_ids[place[0], place[3]])
    if problem.attn_mask is not None:
        visible = visible & problem.attn_mask[_at(problem.attn_mask, place)]
    return band, visible


def _dropout(problem: Problem, seed: Tensor, at: _Picked, rows: Tensor) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout_p), [K, ROWS, KEYS]: the words of `draws.entry_words`."""
    s = problem.static
    plane = (at.batch * problem.query.shape[1] + at.head)[:, None, None]
    groups = at.tile[:, None, None] * (KEYS // 4) + torch.arange(KEYS // 4, device=rows.device)
    word = torch.full((), stream_word(s.site, STREAM_DROPOUT), dtype=torch.int64, device=rows.device)
    words = torch.stack(philox(seed, groups, rows[..., None], plane, word), -1).flatten(-2)
    return (words >= s.drop_below) / (1 - s.dropout_p)
