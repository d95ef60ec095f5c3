"""Forward: the library's own kernel where there is one, else an online softmax over tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.problem import Problem, Softmax, empty_output
from fx_passes.ops.tiled import extreme
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.library import library_applies, library_forward
from fx_passes.ops.tiled.tiles import grouped, row_blocks, row_softmax, tiles


def forward(problem: Problem, dropout_seed: Tensor) -> tuple[Tensor, Softmax]:
    """Out [B, H, M, E] in the query's dtype, and the softmax of every row."""
    if not extreme.in_range(problem):
        return extreme.forward(problem, dropout_seed)
    if library_applies(problem):
        return library_forward(problem)
    return _tiled(problem, dropout_seed)


def _tiled(problem: Problem, dropout_seed: Tensor) -> tuple[Tensor, Softmax]:
    b, h, m, _ = problem.query.shape
    dtype, e = problem.accumulate_dtype, problem.value.shape[-1]
    out = empty_output(problem.query, (b, h, m, e)).zero_()
    maximum = problem.query.new_zeros((b, h, m), dtype=dtype)
    softmax = Softmax(maximum, torch.ones_like(maximum))
    for rows in row_blocks(problem):
        # Two passes over the logits rather than one with rescaling: the weights are then the backward's, bit for bit.
        softmax.maximum[:, :, rows], softmax.total[:, :, rows] = row_softmax(problem, rows)
        sum_ = problem.query.new_zeros((b, h, rows.stop - rows.start, e), dtype=dtype)
        for tile in tiles(problem, rows):
            w = tile.logits.sub_(softmax.maximum[:, :, rows, None]).exp_().div_(softmax.total[:, :, rows, None])
            if problem.static.dropout_p:
                w = w * dropout_factor(problem, dropout_seed, tile)
            value = problem.value[:, :, tile.keys].to(dtype)
            sum_ += (grouped(w, problem.group) @ value).view(sum_.shape)
        out[:, :, rows] = sum_
    return out, softmax
