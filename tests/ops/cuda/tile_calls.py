"""Calls of the kernels of the sampler "tile" and their check against the reference, on whatever device runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fx_passes.ops import tile_rule
from fx_passes.ops.cuda import attention, launch_tile
from fx_passes.ops.draws import STREAM_TILE, row_words
from fx_passes.ops.problem import Problem, Upstream
from fx_passes.ops.reference import dense_attention, sus_gradients, tile_draw, tile_multiplier
from tests.ops.cuda.calls import SEED, TOLERANCE, check_blind, dense, dropout, error
from tests.ops.cuda.calls import problem as _problem

NAMES = ("query", "key", "value", "attn_bias", "sinks")


def problem(static: dict[str, Any] | None = None, **options: Any) -> Problem:
    return _problem(static={"sampler": "tile", **(static or {})}, **options)


def run(p: Problem, c: float, grad: Tensor | None = None, seed: Tensor = SEED) -> dict[str, Any]:
    """Forward and backward, sparse whatever the sizes, with everything that a test may look at."""
    c_tensor = torch.tensor(c, dtype=torch.float64)
    drawn: list[launch_tile.Tiles] = []

    def spy(*args: Any) -> launch_tile.Tiles:
        drawn.append(launch_tile.launch_tile_draw(*args))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "launch_tile_draw", spy)
        patch.setattr(tile_rule, "LARGEST_SHARE", 2.0 if c < float("inf") else 0.5)
        out, softmax, kept = attention.forward(p, c_tensor, seed, SEED)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out) if grad is None else grad
        bias_grad = p.attn_bias is not None
        gradients, count = attention.backward(p, Upstream(grad, out, softmax, kept, c_tensor, seed, SEED, bias_grad))
    tiles = drawn[-1] if drawn else None
    return {"out": out, "softmax": softmax, "grad": grad, "gradients": gradients, "count": count, "tiles": tiles}


def drawn(p: Problem, tiles: launch_tile.Tiles) -> tuple[Tensor, Tensor]:
    """What the kernels kept, bool [B, H, blocks, tiles], and with which q."""
    count = tile_rule.count(p.key.shape[2], tile_rule.KEYS)
    in_use = torch.arange(tiles.tile.shape[3], device=tiles.tile.device) < tiles.counts[..., None]
    assert (tiles.tile[~in_use] == tiles.unused).all()
    at = torch.where(in_use, tiles.tile % count, count).long()
    hits = torch.zeros(*at.shape[:3], count + 1, dtype=torch.int64, device=at.device).scatter_add_(
        -1, at, in_use.long()
    )
    assert hits[..., :count].max() <= 1, "a tile is in a list twice"
    q = torch.zeros(hits.shape, dtype=torch.float64, device=at.device).scatter_(-1, at, 1 / tiles.inverse.double())
    return hits[..., :count].bool().cpu(), q[..., :count].cpu()


def words(p: Problem, seed: Tensor = SEED) -> Tensor:
    b, h, m, _ = p.query.shape
    heads, block = torch.arange(b * h).view(b, h, 1), torch.arange(tile_rule.count(m, tile_rule.ROWS))
    return row_words(seed.cpu(), p.static.site, heads, block, STREAM_TILE)


def check(p: Problem, c: float) -> dict[str, Any]:
    """Out and gradients against the reference with the tiles that the kernels kept, and these against the rule."""
    r, reference, factor = run(p, c), dense(p), dropout(p)
    limit, (m, n) = TOLERANCE[p.query.dtype], (p.query.shape[2], p.key.shape[2])
    assert error(r["out"], dense_attention(reference, factor)) < limit
    mine, known = drawn(p, r["tiles"])
    chosen, q = tile_draw(reference, r["grad"], c, words(p))
    # A boundary that float32 rounds to the other side of a point moves one tile.
    assert (mine != chosen).sum() <= (2 if p.query.dtype == torch.float32 else 2 + 0.1 * chosen.sum())
    assert not (mine & (q == 0)).any()
    assert mine[q >= 1 - 1e-6].double().mean().nan_to_num(1) > 0.999  # what is certain is there
    both = mine & chosen
    assert error(known[both], q[both]) < limit
    multiplier = tile_multiplier(mine, known, m, n).to(p.query.device)
    gradients = sus_gradients(reference, r["grad"], multiplier, factor)
    for name, right in gradients.items():
        assert error(getattr(r["gradients"], name), right) < 4 * limit, name
    check_blind(r, reference.weights(reference.logits()))
    return r


def check_expectation(p: Problem, c: float) -> None:
    """256 heads with equal contents draw independently: their mean is within the error that their spread predicts."""
    (_, _, m, _), n, e, heads = p.query.shape, p.key.shape[2], p.value.shape[-1], 256
    wide = Problem(*(x.expand(-1, heads, -1, -1) for x in (p.query, p.key, p.value)), *[None] * 6, static=p.static)
    grad = torch.randn(1, 1, m, e, generator=torch.Generator().manual_seed(1)).to(p.query)
    r = run(wide, c, grad.expand(1, heads, m, e))
    exact = sus_gradients(dense(p), grad, torch.ones(1, 1, m, n, device=grad.device))
    for name in NAMES[:3]:
        samples = getattr(r["gradients"], name)[0].double()
        noise = samples.var(0).sum().div(heads).sqrt()
        assert (samples.mean(0) - exact[name][0, 0]).norm() < 1.3 * noise, name
        assert noise < 0.3 * exact[name].norm()
