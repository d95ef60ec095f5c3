"""Backward: exact over tiles at c = inf, else by the kept entries of each block of rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fx_passes.ops.problem import LARGEST_C, Gradients, Problem, Upstream, sink_gradient, sink_weights
from fx_passes.ops.tiled import extreme
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.library import library_backward, library_backward_applies, sharpen
from fx_passes.ops.tiled.sample import Entries, independent, row_offsets, systematic
from fx_passes.ops.tiled.sums import Sums, add_rows
from fx_passes.ops.tiled.tile import add_tiles
from fx_passes.ops.tiled.tiles import Tile, grouped, part, row_blocks, tiles, weights

_GATHERED = 1 << 22  # numbers in one gathered [entries, head_dim] tensor


def backward(problem: Problem, upstream: Upstream) -> tuple[Gradients, int]:
    """Gradients, and the number of entries used."""
    grad, out = upstream.grad, upstream.out
    if not extreme.in_range(problem, grad, out):
        return extreme.backward(problem, upstream)
    c = float(upstream.c)
    if math.isinf(c) and not upstream.bias_grad and library_backward_applies(problem, upstream.softmax):
        return library_backward(problem, grad, out, upstream.softmax)
    upstream = replace(upstream, softmax=sharpen(problem, upstream.softmax))
    dtype = problem.accumulate_dtype
    query, key, value = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (problem.query, problem.key, problem.value)
    )
    bias = None
    if upstream.bias_grad and problem.attn_bias is not None:
        bias = torch.zeros(problem.attn_bias.shape, dtype=dtype, device=grad.device)
    sums = Sums(query, key, value, bias)
    delta = (grad.to(dtype) * out.to(dtype)).sum(-1)
    count = 0
    if math.isinf(c):
        for rows in row_blocks(problem):
            count += _dense_rows(problem, upstream, rows, delta, sums)
    elif problem.static.sampler == "tile":
        count = add_tiles(problem, upstream, delta, min(c, LARGEST_C), sums)
    else:
        for rows in row_blocks(problem):
            count += _sampled_rows(problem, upstream, rows, delta, min(c, LARGEST_C), sums)
    sinks = None
    if problem.sinks is not None:
        sinks = sink_gradient(problem, sink_weights(problem, upstream.softmax), delta)
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


def _dense_rows(problem: Problem, upstream: Upstream, rows: slice, delta: Tensor, sums: Sums) -> int:
    group, scale, count = problem.group, problem.static.scale, 0
    query = grouped(problem.query[:, :, rows].to(sums.query.dtype), group)
    grad_rows = grouped(upstream.grad[:, :, rows].to(sums.query.dtype), group)
    for tile in tiles(problem, rows):
        w = weights(tile, upstream.softmax)
        count += w.numel()
        key, value = (x[:, :, tile.keys].to(w.dtype) for x in (problem.key, problem.value))
        grad_w = (grad_rows @ value.transpose(-2, -1)).view(w.shape)
        used = w
        if problem.static.dropout_p:
            factor = dropout_factor(problem, upstream.dropout_seed, tile)
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


def _sampled_rows(problem: Problem, upstream: Upstream, rows: slice, delta: Tensor, c: float, sums: Sums) -> int:
    (b, h), seed, count = problem.query.shape[:2], upstream.seed, 0
    phase = row_offsets(seed, problem.static.site, b * h, rows)
    for tile in tiles(problem, rows):
        w = weights(tile, upstream.softmax).flatten(0, 1)
        if problem.static.sampler == "systematic":
            entries, phase = systematic(w, c, phase)
        else:
            entries = independent(w, c, seed, problem.static.site, tile)
        factor = None
        if problem.static.dropout_p:
            of_tile = dropout_factor(problem, upstream.dropout_seed, tile).flatten(0, 1)
            factor = of_tile[entries.head, entries.row, entries.key]
        size = max(1, _GATHERED // max(problem.query.shape[-1], problem.value.shape[-1], 1))
        for start in range(0, len(entries.head), size):
            chunk = slice(start, start + size)
            _add_entries(problem, tile, entries, chunk, factor, upstream.grad, delta, sums)
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
    add_rows(sums.value, batch, key_head, key, grad_rows * used[:, None])
    if sums.bias is not None:
        place = [
            torch.zeros_like(i) if size == 1 else i
            for i, size in zip((batch, query_head, row, key), sums.bias.shape, strict=True)
        ]
        sums.bias.index_put_(tuple(place), grad_logits, accumulate=True)
    if tile.cap_slope is not None:
        grad_logits = grad_logits * tile.cap_slope[batch, query_head, entries.row[chunk], entries.key[chunk]]
    scaled = (grad_logits * problem.static.scale)[:, None]
    add_rows(sums.query, batch, query_head, row, problem.key[batch, key_head, key].to(dtype) * scaled)
    add_rows(sums.key, batch, key_head, key, problem.query[batch, query_head, row].to(dtype) * scaled)
