"""The estimator: unbiased for every feature, keeps what it should, repeats itself by seed."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fx_passes.ops.problem import SAMPLERS, Problem, Static
from fx_passes.ops.reference import sus_gradients
from fx_passes.ops.tiled import sample, tiles
from tests.ops.cases import CASES, Case, dense, run
from tests.statistics import assert_unbiased, z_scores

INF = float("inf")
FEATURES = [name for name in CASES if name not in ("empty batch", "several tiles", "window", "two-sided window")]
SAMPLED = [s for s in SAMPLERS if s in ("systematic", "independent")]


@pytest.mark.parametrize(
    ("sampler", "dtype"),  # float32 goes to the native kernel where it applies, float64 to the PyTorch path
    [("systematic", torch.float32), ("systematic", torch.float64), ("independent", torch.float64)],
)
@pytest.mark.parametrize("name", FEATURES)
def test_unbiased(name: str, sampler: str, dtype: torch.dtype) -> None:
    tensors, static, grad = CASES[name].build(dtype)
    exact = run(tensors, static, grad, INF)[1]
    draws = [run(tensors, static, grad, 6.0, seed, sampler=sampler)[1] for seed in range(150)]
    for key, true in exact.items():
        assert_unbiased(lambda seed, key=key: draws[seed][key], true, 150, resolution=0.05)


@pytest.mark.parametrize("sampler", SAMPLED)
def test_unbiased_to_a_percent(sampler: str) -> None:
    tensors, static, grad = CASES["causal"].build()
    exact = run(tensors, static, grad, INF)[1]["value"]
    assert_unbiased(lambda s: run(tensors, static, grad, 6.0, s, sampler=sampler)[1]["value"], exact, 600, 0.005)


def test_a_planted_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["fx_passes.ops.tiled.backward"]  # the package's name for it is the function

    def biased(weights: Tensor, c: float, phase: Tensor) -> tuple[sample.Entries, Tensor]:
        entries, after = sample.systematic(weights, c, phase)
        return sample.Entries(entries.head, entries.row, entries.key, entries.weight * 1.03), after

    tensors, static, grad = CASES["causal"].build(torch.float64)
    exact = run(tensors, static, grad, INF)[1]["value"]
    monkeypatch.setattr(module, "systematic", biased)
    z, error = z_scores(lambda s: run(tensors, static, grad, 6.0, s)[1]["value"], exact, 600)
    assert error < 0.005
    assert float(z.abs().max()) > 4.5


def _weights(case: Case) -> tuple[Problem, tiles.Tile, Tensor]:
    tensors, static, _ = case.build(torch.float64)
    filled = {name: tensors.get(name) for name in Problem.__dataclass_fields__ if name != "static"}
    problem = Problem(**filled, static=Static(**{"scale": 0.25, **static}))
    rows = slice(0, case.rows)
    softmax = tiles.Softmax(*tiles.row_softmax(problem, rows))
    (tile,) = tiles.tiles(problem, rows)
    return problem, tile, tiles.weights(tile, softmax).flatten(0, 1)


@pytest.mark.parametrize("c", [0.3, 1.0, 7.5, 40.0])
@pytest.mark.parametrize("sampler", SAMPLED)
def test_keep_probability_and_weight(sampler: str, c: float) -> None:
    """Over many seeds, entry j of row i is kept with min(1, c W_ij) and then weighs max(W_ij, 1 / c)."""
    case = Case(batch=1, heads=2, groups=2, rows=3, keys=300, static={"right": 200})
    _, tile, w = _weights(case)
    w = w.detach()
    count, seeds = torch.zeros_like(w), 1000
    for seed in range(seeds):
        key = torch.tensor(seed)
        if sampler == "systematic":
            entries, _ = sample.systematic(w, c, sample.row_offsets(key, 0, 2, slice(0, 3)))
            kept = torch.bincount(entries.head * 3 + entries.row, minlength=6)
            assert int(kept.max()) <= -(-c // 1) + 1
        else:
            entries = sample.independent(w, c, key, 0, tile)
        count[entries.head, entries.row, entries.key] += 1
        true = w[entries.head, entries.row, entries.key].clamp(min=1 / c)
        torch.testing.assert_close(entries.weight, true, rtol=1e-5, atol=0)
    q = (c * w).clamp(max=1)
    assert torch.equal(count[q == 1], torch.full_like(count[q == 1], seeds))
    assert int(count[w == 0].sum()) == 0
    drawn = (seeds * q > 2) & (q < 1)
    z = ((count - seeds * q) / (seeds * q * (1 - q)).sqrt())[drawn]
    assert float(z.abs().max()) < 6
    assert 0.8 < float((z**2).mean()) < 1.2
    rare = (seeds * q <= 2) & (q > 0)
    expected = float(seeds * q[rare].sum())
    assert abs(float(count[rare].sum()) - expected) < 5 * expected**0.5 + 1e-9


@pytest.mark.parametrize("name", ["causal", "GQA", "bias", "softcap", "sinks", "padding"])
def test_gradients_of_a_given_draw(name: str) -> None:
    """The entries that one draw kept, put into the dense float64 estimator, give the op's gradients."""
    case = CASES[name]
    tensors, static, grad = case.build(torch.float64)
    filled = {key: tensors.get(key) for key in Problem.__dataclass_fields__ if key != "static"}
    problem = Problem(**filled, static=Static(**{"scale": case.width**-0.5, **static}))
    rows = slice(0, case.rows)
    softmax = tiles.Softmax(*tiles.row_softmax(problem, rows))
    multiplier = torch.zeros(case.batch * case.heads, case.rows, case.keys, dtype=torch.float64)
    phase = sample.row_offsets(torch.tensor(5), 0, case.batch * case.heads, rows)
    for tile in tiles.tiles(problem, rows):
        w = tiles.weights(tile, softmax).flatten(0, 1)
        entries, phase = sample.systematic(w, 6.0, phase)
        place = (entries.head, entries.row + tile.row, entries.key + tile.key)
        multiplier[place] = entries.weight / w[entries.head, entries.row, entries.key]
    true = sus_gradients(dense(tensors, static), grad, multiplier.view(case.batch, case.heads, case.rows, case.keys))
    found = run(tensors, static, grad, 6.0, seed=5)[1]
    for key, value in found.items():
        torch.testing.assert_close(value, true[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sampler", SAMPLED)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_tiling_does_not_change_the_draw(sampler: str, dropout_p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, static, grad = CASES["several tiles"].build(torch.float64)

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(3)
        return run(tensors, static, grad, 9.0, sampler=sampler, dropout_p=dropout_p)[1]

    one = gradients()
    monkeypatch.setattr(tiles, "_ELEMENTS", 1 << 16)
    two = gradients()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLED)
def test_dropped_weights_are_dropped_in_the_backward(sampler: str) -> None:
    """With c = inf against the dense form that uses the same dropout; then unbiased for that dropout."""
    tensors, static, grad = CASES["causal"].build(torch.float64)

    def gradients(c: float, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(11)
        return run(tensors, static, grad, c, seed, dropout_p=0.3, sampler=sampler)

    out, exact = gradients(INF, 0)
    value = tensors["value"]
    eye = torch.eye(value.shape[2], dtype=torch.float64).expand(2, 4, -1, -1)
    torch.manual_seed(11)
    dropped = run(
        {**tensors, "value": eye.requires_grad_()}, static, torch.zeros(2, 4, 40, 40).double(), INF, dropout_p=0.3
    )[0]
    torch.testing.assert_close(dropped @ value, out)
    weights = dense(tensors, static).weights(dense(tensors, static).logits())
    factor = (dropped / weights.clamp_min(1e-300)).where(weights > 0, 0)
    assert set(factor.detach().flatten().mul(0.7).round(decimals=9).tolist()) == {0.0, 1.0}
    true = sus_gradients(dense(tensors, static), grad, torch.ones_like(weights), factor)
    for key in exact:
        torch.testing.assert_close(exact[key], true[key])
    draws = [gradients(6.0, seed)[1] for seed in range(150)]
    for key in exact:
        assert_unbiased(lambda seed, key=key: draws[seed][key], exact[key], 150, resolution=0.05)
    kept = float((factor > 0).double().sum() / (weights > 0).double().sum())
    assert abs(kept - 0.7) < 0.02


def test_streams_are_independent() -> None:
    """Another seed, site, head or row draws anew; the same ones draw the same."""
    seed = torch.tensor(7)
    base = sample.row_offsets(seed, 3, 4, slice(0, 64))
    assert torch.equal(base, sample.row_offsets(seed, 3, 4, slice(0, 64)))
    assert torch.equal(base[:, 10:20], sample.row_offsets(seed, 3, 4, slice(10, 20)))
    for other in (sample.row_offsets(seed + 1, 3, 4, slice(0, 64)), sample.row_offsets(seed, 4, 4, slice(0, 64))):
        assert int((base == other).sum()) == 0
    assert base.unique().numel() == base.numel()
