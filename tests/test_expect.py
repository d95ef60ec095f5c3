"""What `explain` expects of SUS: operations counted against formulas, and times measured here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_passes import expect as module
from fx_passes import explain
from fx_passes.expect import AttentionCall, Expectation, expect

B, H, N, D = 2, 4, 64, 8
WIDTH = H * D


class Model(nn.Module):
    """Projections of 4 WIDTH^2 and one attention, by the library or by hand, with things that a forward changes."""

    def __init__(self, by_hand: bool = False, causal: bool = False, key_heads: int = H, dropout: float = 0.0) -> None:
        super().__init__()
        self.by_hand, self.causal, self.key_heads, self.dropout = by_hand, causal, key_heads, dropout
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * D) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(B, N, H, D).transpose(1, 2)
        k, v = (p(x).view(B, N, self.key_heads, D).transpose(1, 2) for p in (self.k, self.v))
        if self.by_hand:
            y = torch.softmax(q @ k.mT / math.sqrt(D), -1) @ v
        else:
            options = {"is_causal": self.causal, "enable_gqa": self.key_heads != H, "dropout_p": self.dropout}
            y = F.scaled_dot_product_attention(q, k, v, **options)
        y = self.o(F.dropout(y.transpose(1, 2).reshape(B, N, WIDTH), 0.1))
        return self.norm(y.flatten(0, 1))


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_operations_are_those_of_the_formulas(by_hand: bool, causal: bool) -> None:
    if by_hand and causal:
        pytest.skip("a mask by hand computes all pairs")
    expected = expect(Model(by_hand, causal), (torch.randn(B, N, WIDTH),), {})
    assert expected is not None
    linear = 4 * 2 * B * N * WIDTH**2
    attention = 2 * 2 * B * H * N * N * D / (2 if causal else 1)
    assert expected.other_flops == linear
    assert [call.flops for call in expected.calls] == [attention]
    assert expected.keys == N
    backward = attention * (2.0 if by_hand else 2.5)
    share = backward / (3 * linear + attention + backward)
    assert expected.backward_share == pytest.approx(share)
    assert expected.largest_speedup == pytest.approx(1 / (1 - share))


def test_grouped_heads_cost_what_all_heads_cost() -> None:
    expected = expect(Model(key_heads=2), (torch.randn(B, N, WIDTH),), {})
    assert expected is not None
    (call,) = expected.calls
    assert (call.heads, call.flops) == (H, 4 * B * H * N * N * D)


def test_with_dropout_the_library_computes_all_weights() -> None:
    expected = expect(Model(dropout=0.1), (torch.randn(B, N, WIDTH),), {})
    assert expected is not None
    assert [(call.flops, call.fused) for call in expected.calls] == [(4 * B * H * N * N * D, False)]
    assert expected.other_flops == 4 * 2 * B * N * WIDTH**2


def test_a_softmax_that_is_no_attention_is_none() -> None:
    router = nn.Sequential(nn.Linear(WIDTH, 4), nn.Softmax(-1), nn.Linear(4, WIDTH))
    expected = expect(router, (torch.randn(B, N, WIDTH),), {})
    assert expected is not None
    assert expected.calls == []
    assert expected.backward_share == 0
    assert str(expected).startswith("No attention was seen")
    assert expected.speedup(30) is None


def test_explain_leaves_the_model_and_the_generator_as_a_single_run_does() -> None:
    """The runs that count and time leave no trace."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(B, N, WIDTH)
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    assert expect(model, (x,), {}) is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_a_model_that_needs_gradients_is_explained_without() -> None:
    def attention(x: Tensor) -> Tensor:
        y = torch.softmax(x @ x.mT, -1) @ x
        torch.autograd.grad(y.sum(), x, retain_graph=True)
        return y

    assert expect(attention, (torch.randn(2, 8, 4, requires_grad=True),), {}) is None


def test_the_report_says_what_to_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CALLS", 1)
    report = explain(Model(causal=True), torch.randn(B, N, WIDTH))
    assert report.rewritten == 1
    assert report.expectation is not None
    text = str(report)
    assert f"of a training step's operations at n = {N}; if it were free" in text
    assert f"predicted for this device, n = {N}: " in text
    assert f"n = {4 * N}: " in text
    assert "x at c = 30, " in text
    speedup = report.expectation.speedup(12.0, times=2)
    assert speedup is not None
    assert 0.02 < speedup < 50
    assert report.expectation.speedup(12.0, times=2) == speedup  # timed once


def test_predictions_follow_the_times_and_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's forward takes 1 s, its backward 3 s, with SUS 0.5 s, and all else 2 s forward, 4 s backward."""
    call = AttentionCall(1, 1, 1, N, N, D, False, True, torch.float32, "cpu")

    def seconds(_: AttentionCall, c: float | None, times: int) -> Any:
        return module._Times(times**2, times**2 + (3 * times**2 if c is None else 0.5 * times))

    monkeypatch.setattr(module, "_seconds", seconds)
    expected = Expectation([call], 1.0, 3.0)
    assert expected.speedup(30) == pytest.approx((6 + 4) / (6 + 1.5))
    assert expected.speedup(30, times=4) == pytest.approx((24 + 64) / (24 + 18))
    assert Expectation([call], 1.0, 3.0).speedup(30, times=1000) is None
    assert "not timed above" in str(
        Expectation([AttentionCall(1, 1, 1, 8000, 8000, D, False, True, torch.float32, "cpu")], 1, 3)
    )
