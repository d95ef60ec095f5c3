"""Backward: exact over tiles at c = inf, else by the kept entries of each block of rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fx_passes.ops.problem import Gradients, Problem, Softmax, sink_gradient, sink_weights
from fx_passes.ops.tiled import extreme
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.library import sharpen
from fx_passes.ops.tiled.sample import Entries, independent, row_offsets, systematic
from fx_passes.ops.tiled.sums import Sums
from fx_passes.ops.tiled.tile import add_tiles
from fx_passes.ops.tiled.tiles import Tile, grouped, part, row_blocks, tiles, weights

# Beyond it, c times 2^32 units per unit of weight would pass 63 bits; q = min(1, _LARGEST_C * W) is as unbiased.
_LARGEST_C = float(1 << 30)
_GATHERED = 1 << 22  # numbers in one gathered [entries, head_dim] tensor


def backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    softmax: Softmax,
    c: Tensor,
    seed: Tensor,
    dropout_seed: Tensor,
    bias_grad: bool,
) -> tuple[Gradients, int]:
    """Gradients, and the number of entries used. Arguments as in `schema.attention_backward`."""
    if not extreme.in_range(problem, grad, out):
        return extreme.backward(problem, grad, out, dropout_seed, bias_grad)
    softmax = sharpen(problem, softmax)
    dtype = problem.accumulate_dtype
    query, key, value = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (problem.query, problem.key, problem.value)
    )
    wants_bias = bias_grad and problem.attn_bias is not None
    bias = torch.zeros(problem.attn_bias.shape, dtype=dtype, device=grad.device) if wants_bias else None  # type: ignore[union-attr]
    sums = Sums(query, key, value, bias)
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    limit = float(c)
    if not math.isinf(limit):
        limit = min(limit, _LARGEST_C)
    count = 0
    whole = problem.static.sampler == "tile" and not math.isinf(limit)
    if whole:
        count = add_tiles(problem, grad, softmax, delta, limit, seed, dropout_seed, sums)
    for rows in [] if whole else row_blocks(problem):
        if math.isinf(limit):
            count += _dense_rows(problem, rows, grad, softmax, delta, dropout_seed, sums)
        else:
            count += _sampled_rows(problem, rows, grad, softmax, delta, limit, seed, dropout_seed, sums)
    sinks = None
    if problem.sinks is not None:
        sinks = sink_gradient(problem, sink_weights(problem, softmax), delta)
    return (
        Gradients(
            sums.query.to(problem.query.dtype),
            sums.key.to(problem.key.dtype),
            sums.value.to(problem.value.dtype),
            None if bias is None or problem.attn_bias is None else bias.to(problem.attn_bias.dtype),
            sinks,
        ),
        count,
    )


def _dense_rows(
    problem: Problem, rows: slice, grad: Tensor, softmax: Softmax, delta: Tensor, dropout_seed: Tensor, sums: Sums
) -> int:
    group, scale, count = problem.group, problem.static.scale, 0
    query = grouped(problem.query[:, :, rows].to(sums.query.dtype), group)
    grad_rows = grouped(grad[:, :, rows].to(sums.query.dtype), group)
    for tile in tiles(problem, rows):
        w = weights(tile, softmax)
        count += w.numel()
        key, value = (x[:, :, tile.keys].to(w.dtype) for x in (problem.key, problem.value))
        grad_w = (grad_rows @ value.transpose(-2, -1)).view(w.shape)
        used = w
        if problem.static.dropout_p:
            factor = dropout_factor(problem, dropout_seed, tile)
            grad_w, used = grad_w * factor, w * factor
        sums.value[:, :, tile.keys] += grouped(used, group).transpose(-2, -1) @ grad_rows
        grad_logits = w * (grad_w - delta[:, :, rows, None])
        if sums.bias is not None:
            target = part(sums.bias, rows, tile.keys)
            target += grad_logits.sum_to_size(target.shape)
        if tile.cap_slope is not None:
            grad_logits = grad_logits * tile.cap_slope
        flat = grouped(grad_logits, group)
        sums.query[:, :, rows] += ((flat @ key) * scale).view(*w.shape[:3], -1)
        sums.key[:, :, tile.keys] += (flat.transpose(-2, -1) @ query) * scale
    return count


def _sampled_rows(
    problem: Problem,
    rows: slice,
    grad: Tensor,
    softmax: Softmax,
    delta: Tensor,
    c: float,
    seed: Tensor,
    dropout_seed: Tensor,
    sums: Sums,
) -> int:
    b, h = problem.query.shape[:2]
    count = 0
    phase = row_offsets(seed, problem.static.site, b * h, rows)
    for tile in tiles(problem, rows):
        w = weights(tile, softmax).flatten(0, 1)
        if problem.static.sampler == "systematic":
            entries, phase = systematic(w, c, phase)
        else:
            entries = independent(w, c, seed, problem.static.site, tile)
        factor = None
        if problem.static.dropout_p:
            factor = dropout_factor(problem, dropout_seed, tile).flatten(0, 1)[entries.head, entries.row, entries.key]
        size = max(1, _GATHERED // max(problem.query.shape[-1], problem.value.shape[-1]))
        for start in range(0, len(entries.head), size):
            chunk = slice(start, start + size)
            _add_entries(problem, tile, entries, chunk, factor, grad, delta, sums)
        count += len(entries.head)
    return count


def _add_entries(
    problem: Problem,
    tile: Tile,
    entries: Entries,
    chunk: slice,
    factor: Tensor | None,
    grad: Tensor,
    delta: Tensor,
    sums: Sums,
) -> None:
    h, dtype = problem.query.shape[1], sums.query.dtype
    head, weight = entries.head[chunk], entries.weight[chunk]
    batch, query_head = head // h, head % h
    key_head = query_head // problem.group
    row, key = entries.row[chunk] + tile.row, entries.key[chunk] + tile.key
    grad_rows = grad[batch, query_head, row].to(dtype)
    grad_w = (grad_rows * problem.value[batch, key_head, key].to(dtype)).sum(-1)
    used = weight
    if factor is not None:
        grad_w, used = grad_w * factor[chunk], weight * factor[chunk]
    grad_logits = weight * (grad_w - delta[batch, query_head, row])
    _add_rows(sums.value, batch, key_head, key, grad_rows * used[:, None])
    if sums.bias is not None:
        place = [
            torch.zeros_like(i) if size == 1 else i
            for i, size in zip((batch, query_head, row, key), sums.bias.shape, strict=True)
        ]
        sums.bias.index_put_(tuple(place), grad_logits, accumulate=True)
    if tile.cap_slope is not None:
        grad_logits = grad_logits * tile.cap_slope[batch, query_head, entries.row[chunk], entries.key[chunk]]
    scaled = (grad_logits * problem.static.scale)[:, None]
    _add_rows(sums.query, batch, query_head, row, problem.key[batch, key_head, key].to(dtype) * scaled)
    _add_rows(sums.key, batch, key_head, key, problem.query[batch, query_head, row].to(dtype) * scaled)


def _add_rows(target: Tensor, batch: Tensor, head: Tensor, place: Tensor, rows: Tensor) -> None:
    """``target[batch, head, place] += rows`` with repeated places added up; target is contiguous."""
    _, heads, places, width = target.shape
    if width == 0:  # logits as a whole: query and key are empty
        return
    target.view(-1, width).index_add_(0, (batch * heads + head) * places + place, rows)
