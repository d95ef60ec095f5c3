"""Dropout of attention weights as a function of (seed, site, head, row, key), so that the backward repeats it."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.draws import STREAM_DROPOUT, entry_words
from fx_passes.ops.problem import Problem
from fx_passes.ops.tiled.tiles import Tile


def dropout_factor(problem: Problem, seed: Tensor, tile: Tile) -> Tensor:
    """0 where a weight is dropped, else 1 / (1 - dropout_p): [B, H, m, n] of a tile."""
    b, h, m, n = tile.logits.shape
    device = tile.logits.device
    heads = torch.arange(b * h, device=device)
    rows = torch.arange(tile.row, tile.row + m, device=device)
    keys = torch.arange(tile.key, tile.key + n, device=device)
    words = entry_words(seed, problem.static.site, STREAM_DROPOUT, heads, rows, keys).view(b, h, m, n)
    s = problem.static
    return (words >= s.drop_below).to(tile.logits.dtype) / (1 - s.dropout_p)
