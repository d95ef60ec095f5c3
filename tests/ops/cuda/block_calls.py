"""Calls of the block sampler's kernels and their check against the float64 reference, on whatever device runs them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_passes.ops.cuda import lists
from fx_passes.ops.draws import STREAM_BLOCK, row_words
from fx_passes.ops.problem import Problem
from fx_passes.ops.reference import dense_attention, sus_gradients
from fx_passes.ops.tiled.block import ROWS, choose, probabilities
from tests.ops.cuda.calls import SEED, TOLERANCE, check_blind, dense, dropout, error, run
from tests.ops.cuda.calls import problem as _problem


def problem(static: dict[str, Any] | None = None, **options: Any) -> Problem:
    return _problem(static={"sampler": "block", **(static or {})}, **options)


def drawn(p: Problem, c: float) -> tuple[Tensor, Tensor]:
    """Which keys the definition chooses and with which q, [B, H, blocks, N], from float64 weights."""
    weights = dense(p).weights(dense(p).logits())
    b, h, m, n = weights.shape
    short = -m % ROWS
    padded = torch.cat([weights, weights.new_zeros(b, h, short, n)], 2).view(b, h, -1, ROWS, n)
    q = probabilities(padded.square().sum(3).sqrt(), c)
    heads = torch.arange(b * h, device=q.device).view(b, h, 1)
    words = row_words(SEED, p.static.site, heads, torch.arange(q.shape[2], device=q.device), STREAM_BLOCK)
    return choose(q, words)


def multipliers(p: Problem, found: lists.BlockLists) -> Tensor:
    """1 / q of the kept entries, 0 of the others, from the lists: [B, H, M, N]."""
    (b, h, m, _), n = p.query.shape, p.key.shape[2]
    blocks = found.counts.shape[2]
    full = torch.zeros(b, h, blocks, n + 1, dtype=torch.float64, device=found.found.device)
    in_use = torch.arange(found.capacity, device=full.device) < found.counts[..., None]
    full.scatter_add_(-1, torch.where(in_use, found.found, n).long(), found.inverse.double())
    return full[..., :-1].repeat_interleave(ROWS, 2)[:, :, :m]


def check(p: Problem, c: float) -> dict[str, Any]:
    """Out and gradients against the reference with the keys that the kernels chose, and these against the rule."""
    r, reference, factor = run(p, c), dense(p), dropout(p)
    limit = TOLERANCE[p.query.dtype]
    found = r["lists"]
    assert isinstance(found, lists.BlockLists)
    assert error(r["out"], dense_attention(reference, factor)) < limit
    chosen, q = drawn(p, c)
    (m, n), blocks = (p.query.shape[2], p.key.shape[2]), found.counts.shape[2]
    mine = torch.zeros(*chosen.shape[:3], n + 1, dtype=torch.int64, device=chosen.device)
    in_use = torch.arange(found.capacity, device=mine.device) < found.counts[..., None]
    mine.scatter_add_(-1, torch.where(in_use, found.found, n).long(), in_use.long())
    mine = mine[..., :-1]
    assert mine.max() <= 1, "a key is in a list twice"
    # A boundary that float32 rounds to the other side of a point moves one key.
    assert (mine.bool() != chosen).sum() <= (4 if p.query.dtype == torch.float32 else 0.1 * chosen.sum())
    assert (found.counts <= c + 1).all()
    assert not (mine.bool() & (q == 0)).any()
    assert mine[q >= 1 - 1e-6].double().mean().nan_to_num(1) > 0.999  # what is certain is there
    both = mine.bool() & chosen
    known = multipliers(p, found)
    rows = [min(i * ROWS, m - 1) for i in range(blocks)]
    assert error(known[:, :, rows][both], 1 / q[both]) < limit
    gradients = sus_gradients(reference, r["grad"], known, factor)
    for name, right in gradients.items():
        assert error(getattr(r["gradients"], name), right) < 4 * limit, name
    weights = reference.weights(reference.logits())
    check_blind(r, weights)
    if p.query.dtype == torch.float32:
        assert int(r["count"]) == int(((weights.float() > 0) & (known > 0)).sum())
    return r
