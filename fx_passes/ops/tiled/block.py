"""The block sampler: a block of 64 query rows shares its keys, so that its backward is dense products on gathered keys.

Key j of a block is kept with ``q_j = min(1, lambda * rms_i W_ij)``, lambda such that the block keeps c keys; every row
of the block then has the weight ``W_ij / q_j``. This is not the paper's rule (c is a number of keys per block, not per
row); it is as unbiased, since q is known. Two passes over the logits: one for the rms, one for the kept columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_passes.ops.draws import STREAM_BLOCK, row_words
from fx_passes.ops.problem import Problem, Softmax
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.tiles import _ELEMENTS, Tile, tiles, weights

if TYPE_CHECKING:
    from fx_passes.ops.tiled.backward import _Sums

ROWS = 64
_ONE = 1 << 32
_STEPS = 8  # of the fixed point for lambda; what it has not reached changes the number of kept keys, not the mean


def _row_slices(problem: Problem) -> Iterator[slice]:
    """Rows that are treated together: whole blocks."""
    b, h, m, _ = problem.query.shape
    size = max(1, min(8, _ELEMENTS // max(1, b * h * min(problem.key.shape[2], 4096) * ROWS))) * ROWS
    for start in range(0, m if b * h else 0, size):
        yield slice(start, min(start + size, m))


def _blocks(x: Tensor) -> Tensor:
    """[B, H, m, ...] as [B, H, blocks, ROWS, ...], the last block padded with zeros."""
    short = -x.shape[2] % ROWS
    if short:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], short, *x.shape[3:])], 2)
    return x.reshape(*x.shape[:2], x.shape[2] // ROWS, ROWS, *x.shape[3:])


def _mean_squares(problem: Problem, rows: slice, softmax: Softmax) -> Tensor:
    """rms of W over the rows of each block, up to a constant: [B, H, blocks, N]."""
    blocks = -(-(rows.stop - rows.start) // ROWS)
    rms = softmax.maximum.new_zeros(*problem.query.shape[:2], blocks, problem.key.shape[2])
    for tile in tiles(problem, rows):
        rms[..., tile.keys] = _blocks(weights(tile, softmax)).square_().sum(3).sqrt_()
    return rms


def probabilities(rms: Tensor, c: float) -> Tensor:
    """``min(1, lambda * rms)`` with a sum of about c along the last dimension, or 1 wherever rms > 0 if c allows it."""
    rms = rms.double()
    scale = c / rms.sum(-1, keepdim=True).clamp(min=1e-300)
    for _ in range(_STEPS):
        certain = rms * scale >= 1
        rest = rms.masked_fill(certain, 0).sum(-1, keepdim=True)
        left = (c - certain.sum(-1, keepdim=True)).clamp(min=0)
        scale = torch.where(rest > 0, torch.maximum(scale, left / rest.clamp(min=1e-300)), scale)
    q = (rms * scale).clamp(max=1)
    return torch.where((rms > 0).sum(-1, keepdim=True) <= c, (rms > 0).double(), q)


def choose(q: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
    """Points at distance 1 on the cumulative q, from a random start: which keys hold one, and the q that they had.

    Args:
        q: [B, H, blocks, N].
        words: one in [0, 2^32) per block, int64 [B, H, blocks].
    """
    units = (q * _ONE).long()
    ends = units.cumsum(-1) + words[..., None]
    return (ends >> 32) > ((ends - units) >> 32), units.double() / _ONE


def add_blocks(
    problem: Problem,
    grad: Tensor,
    softmax: Softmax,
    delta: Tensor,
    c: float,
    seed: Tensor,
    dropout_seed: Tensor,
    sums: _Sums,
) -> int:
    """Adds the gradients of all blocks to `sums`; returns the number of entries used."""
    b, h = problem.query.shape[:2]
    count = 0
    heads = torch.arange(b * h, device=seed.device).view(b, h, 1)
    for rows in _row_slices(problem):
        block = torch.arange(rows.start // ROWS, -(-rows.stop // ROWS), device=seed.device)
        words = row_words(seed, problem.static.site, heads, block, STREAM_BLOCK)
        chosen, q = choose(probabilities(_mean_squares(problem, rows, softmax), c), words)
        for tile in tiles(problem, rows):
            count += _add_tile(problem, tile, chosen[..., tile.keys], q[..., tile.keys], grad, softmax, delta,
                               dropout_seed, sums)  # fmt: skip
    return count


def _columns(x: Tensor, lane: Tensor) -> Tensor:
    """Columns `lane` [B, H, blocks, K] of a tile [B, H, m, n]: [B, H, blocks, ROWS, K]."""
    return _blocks(x).gather(4, lane[:, :, :, None].expand(-1, -1, -1, ROWS, -1))


def _add_tile(
    problem: Problem,
    tile: Tile,
    chosen: Tensor,
    q: Tensor,
    grad: Tensor,
    softmax: Softmax,
    delta: Tensor,
    dropout_seed: Tensor,
    sums: _Sums,
) -> int:
    size = int(chosen.sum(-1).max()) if chosen.numel() else 0
    if not size:
        return 0
    dtype, scale, h = sums.query.dtype, problem.static.scale, problem.query.shape[1]
    valid, lane = chosen.to(torch.int8).topk(size, -1)  # blocks with fewer keys fill up with keys of weight 0
    inverse = (valid / q.gather(-1, lane).clamp(min=1 / _ONE)).to(dtype)[:, :, :, None]
    w = _columns(weights(tile, softmax), lane) * inverse
    count = int((w > 0).sum())
    batch = torch.arange(w.shape[0], device=w.device).view(-1, 1, 1, 1)
    head = torch.arange(h, device=w.device).view(1, -1, 1, 1)
    place = (batch, head // problem.group, lane + tile.key)
    key, value = problem.key[place].to(dtype), problem.value[place].to(dtype)
    query, grad_rows = (_blocks(x[:, :, tile.rows].to(dtype)) for x in (problem.query, grad))
    grad_w = grad_rows @ value.mT
    used = w
    if problem.static.dropout_p:
        factor = _columns(dropout_factor(problem, dropout_seed, tile), lane)
        grad_w, used = grad_w * factor, w * factor
    grad_logits = w * (grad_w - _blocks(delta[:, :, tile.rows])[..., None])
    if sums.bias is not None:
        row = torch.arange(w.shape[2] * ROWS, device=w.device).view(1, 1, -1, ROWS, 1) + tile.row
        at = (batch[..., None], head[..., None], row.clamp(max=problem.query.shape[2] - 1), place[2][:, :, :, None])
        place_of = [torch.zeros_like(i) if n == 1 else i for i, n in zip(at, sums.bias.shape, strict=True)]
        sums.bias.index_put_(tuple(place_of), grad_logits, accumulate=True)
    if tile.cap_slope is not None:
        grad_logits = grad_logits * _columns(tile.cap_slope, lane)
    rows = tile.rows.stop - tile.rows.start
    sums.query[:, :, tile.rows] += ((grad_logits @ key) * scale).flatten(2, 3)[:, :, :rows]
    _scatter(sums.key, place, (grad_logits.mT @ query) * scale)
    _scatter(sums.value, place, used.mT @ grad_rows)
    return count


def _scatter(target: Tensor, place: tuple[Tensor, Tensor, Tensor], x: Tensor) -> None:
    """``target[place] += x`` with repeated places added up; target is contiguous."""
    batch, head, key = place
    _, heads, keys, width = target.shape
    target.view(-1, width).index_add_(0, ((batch * heads + head) * keys + key).flatten(), x.reshape(-1, width))
