"""The block sampler of the tiled path: probabilities, exact weights, expectation, variance and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fx_passes.ops import tiled
from fx_passes.ops.problem import Gradients, Problem, Static
from fx_passes.ops.reference import Dense, sus_gradients
from fx_passes.ops.tiled import block

_NONE = dict.fromkeys(("attn_mask", "attn_bias", "sinks", "query_ids", "key_ids", "prefix"))


def problem(b: int, h: int, g: int, m: int, n: int, static: dict[str, Any] | None = None, **tensors: Any) -> Problem:
    d, spread = 16, 2.0
    generator = torch.Generator().manual_seed(m + n)

    def new(heads: int, length: int) -> Tensor:
        return torch.randn(b, heads, length, d, generator=generator)

    options = {"scale": spread * d**-0.5, "sampler": "block", **(static or {})}
    return Problem(new(h, m), new(g, n), new(g, n), **(_NONE | tensors), static=Static(**options))


def gradients(p: Problem, c: float, seed: int, grad: Tensor | None = None) -> tuple[Gradients, int, Tensor]:
    number = torch.tensor(seed)
    out, softmax = tiled.forward(p, number)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    c_tensor = torch.tensor(c, dtype=torch.float64)
    bias = p.attn_bias is not None
    found, count = tiled.backward(p, grad, out, softmax, c_tensor, number, number, bias)
    return found, count, grad


def dense(p: Problem) -> Dense:
    s = p.static
    given = {name: getattr(p, name) for name in _NONE}
    return Dense(p.query, p.key, p.value, **given, scale=s.scale, left=s.left, right=s.right, softcap=s.softcap)


def test_probabilities_have_the_sum_that_was_asked_for() -> None:
    rms = torch.rand(3, 50) ** 8
    rms[2, 4:] = 0
    q = block.probabilities(rms, 10.0)
    assert q.max() <= 1
    assert q[:2].sum(-1).tolist() == pytest.approx([10, 10], rel=1e-3)
    assert q[2].tolist() == [1.0] * 4 + [0.0] * 46


def test_a_key_is_chosen_as_often_as_it_says() -> None:
    q = torch.tensor([0.0, 0.3, 1.0, 0.05, 0.65, 0.5]).double()
    words = torch.randint(0, 1 << 32, (20000,), generator=torch.Generator().manual_seed(0))
    chosen, known = block.choose(q.expand(1, 1, 20000, -1), words[None, None])
    assert known[0, 0, 0].tolist() == pytest.approx(q.tolist(), abs=1e-9)
    assert chosen[0, 0].double().mean(0).tolist() == pytest.approx(q.tolist(), abs=0.015)


@pytest.mark.parametrize(
    "name",
    [
        "causal",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("plain", "window", "softcap", "sinks", "bias", "dropout", "many tiles")
        ),
    ],
)
def test_mean_over_seeds_is_the_exact_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    static: dict[str, Any] = {
        "causal": {"right": 0},
        "window": {"left": 30, "right": 0},
        "softcap": {"softcap": 3.0},
        "dropout": {"dropout_p": 0.3},
    }.get(name, {})
    tensors: dict[str, Any] = {
        "sinks": {"sinks": torch.ones(2)},
        "bias": {"attn_bias": torch.randn(1, 1, 1, 300, generator=torch.Generator().manual_seed(3))},
    }.get(name, {})
    if name == "many tiles":
        monkeypatch.setattr("fx_passes.ops.tiled.tiles._ELEMENTS", 1 << 15)
    p = problem(1, 2, 1, 150, 300, static=static, **tensors)
    seeds = 48
    total: dict[str, Tensor] = {}
    squares: dict[str, float] = {}
    number = torch.tensor(7)  # dropout's seed stays, the draws' changes
    out, softmax = tiled.forward(p, number)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))

    def run(c: float, seed: int) -> Gradients:
        c_tensor = torch.tensor(c, dtype=torch.float64)
        return tiled.backward(p, grad, out, softmax, c_tensor, torch.tensor(seed), number, "attn_bias" in tensors)[0]

    exact = run(float("inf"), 0)
    names = ["query", "key", "value", *(["attn_bias"] if name == "bias" else [])]
    for seed in range(seeds):
        found = run(40.0, seed)
        for key in names:
            error = getattr(found, key) - getattr(exact, key)
            total[key] = total.get(key, 0) + error
            squares[key] = squares.get(key, 0.0) + float(error.square().sum())
    for key in names:
        noise = squares[key] ** 0.5 / seeds  # of the mean of as many independent draws
        assert 0 < noise < 0.5 * getattr(exact, key).norm(), key
        assert (total[key] / seeds).norm() < 1.3 * noise, key


def test_weights_are_those_of_the_probabilities() -> None:
    """One draw against the reference with the multipliers that the definition gives."""
    p = problem(2, 4, 2, 150, 200, static={"right": 0, "site": 5})
    found, count, grad = gradients(p, 30.0, 11)
    w = dense(p).weights(dense(p).logits())
    multiplier = torch.zeros_like(w)
    for i, rows in enumerate(torch.arange(150).split(block.ROWS)):
        q = block.probabilities(w[:, :, rows].square().sum(2, keepdim=True).sqrt(), 30.0)
        heads = torch.arange(8).view(2, 4, 1)
        words = block.row_words(torch.tensor(11), 5, heads, torch.tensor([i]), block.STREAM_BLOCK)
        chosen, known = block.choose(q, words)
        multiplier[:, :, rows] = (chosen / known.clamp(min=1e-12)).expand(-1, -1, len(rows), -1)
    right = sus_gradients(dense(p), grad, multiplier)
    for name in ("query", "key", "value"):
        assert torch.allclose(getattr(found, name).double(), right[name].double(), atol=1e-3, rtol=1e-3), name
    assert count == int((multiplier * w > 0).sum())


def test_a_budget_beyond_all_keys_is_exact() -> None:
    p = problem(1, 2, 2, 100, 80)
    found, _, grad = gradients(p, 80.0, 3)
    right = sus_gradients(dense(p), grad, torch.ones(1, 2, 100, 80))
    for name in ("query", "key", "value"):
        assert torch.allclose(getattr(found, name).double(), right[name].double(), atol=1e-5)
