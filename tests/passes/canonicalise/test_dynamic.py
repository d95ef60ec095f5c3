"""Symbolic sizes: one graph for several lengths, with every attention of it rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes import SUSBackend
from tests.passes.harness import run, tensors


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def heads_from_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n = q.shape[0], q.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(b, n, 2, -1).transpose(1, 2) for x in (q, k, v))
    seen = torch.ones(n, n, dtype=torch.bool).tril()
    p = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf).softmax(-1)
    return (p @ v).transpose(1, 2).reshape(b, n, -1)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[:, :2], v[:, :2]
    k = k[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape)
    return (q @ k.mT).softmax(-1) @ v.repeat_interleave(2, 1)


def padded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.arange(k.shape[2]) < k.shape[2] - 2
    return (q @ k.mT + torch.where(seen, 0.0, -1e9)).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("f", [plain, sdpa, heads_from_features, einsum, repeated_heads, padded])
def test_lengths_share_one_graph(f: Callable[..., Any], dynamic: bool | None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = SUSBackend(c=math.inf, compiler="eager")
    compiled = torch.compile(f, backend=backend, dynamic=dynamic)
    for n in (7, 9, 12):
        args = tensors(*[(2, 4, n, 6)] * 3)
        backend.c = math.inf
        (outs, grads), (got, got_grads) = run(f, args), run(compiled, args)
        for a, b in zip([*got, *got_grads], [*outs, *grads], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        backend.c = 2
        assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(run(compiled, args)[1], grads, strict=True))
    assert (backend.report.rewritten, backend.report.left) == (1, 0), str(backend.report)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if dynamic else 2)


def seen(n: int, *, window: int | None = None) -> Tensor:
    i = torch.arange(n)
    band = i <= i[:, None]
    return band if window is None else band & (i[:, None] - i < window)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen(q.shape[2]), -math.inf).softmax(-1) @ v


def windowed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen(q.shape[2], window=9), -math.inf).softmax(-1) @ v


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    return (q @ k.mT + torch.triu(torch.full((n, n), -1e9), 1)).softmax(-1) @ v


def with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = (k.sum((1, 3)) > -3)[:, None, None]
    return torch.where(seen(q.shape[2]) & keep, q @ k.mT, -1e9).softmax(-1) @ v


def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(causal, q, k, v, use_reentrant=False)


def half_the_length_ahead(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    i = torch.arange(n)
    return (q @ k.mT).masked_fill(i > i[:, None] + n // 2, -math.inf).softmax(-1) @ v


def errors(f: Callable[..., Any], compiled: Callable[..., Any], n: int) -> float:
    args = tensors(*[(2, 4, n, 6)] * 3)
    (outs, grads), (got, got_grads) = run(f, args), run(compiled, args)
    pairs = zip([*got, *got_grads], [*outs, *grads], strict=True)
    return max(float((a - b).abs().max().detach()) for a, b in pairs)


@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize(
    ("f", "mask"),
    [
        (causal, "causal"),
        (windowed, "causal, window 9"),  # longer than the first batch
        (added, "causal"),
        (with_padding, "causal + mask"),
        (checkpointed, "causal"),
        (half_the_length_ahead, "mask"),
    ],
)
def test_masks_over_symbolic_sizes(f: Callable[..., Any], mask: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    backend = SUSBackend(c=math.inf, compiler="eager")
    compiled = torch.compile(f, backend=backend, dynamic=dynamic)
    assert all(errors(f, compiled, n) < 1e-9 for n in (7, 8, 12, 30))
    assert [(s.status, s.mask) for s in backend.report.sites] == [("rewritten", mask)]


def test_a_mask_that_changes_with_the_size_runs_exactly(caplog: pytest.LogCaptureFixture) -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        i = torch.arange(n)
        hidden = (i > i[:, None]) | ((i == 0) & (i[:, None] * 0.5 == 20))  # row 40 does not see key 0
        return (q @ k.mT).masked_fill(hidden, -math.inf).softmax(-1) @ v

    def warnings() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name.startswith("fx_passes")]

    torch._dynamo.reset()
    backend = SUSBackend(c=math.inf, compiler="eager")
    compiled = torch.compile(f, backend=backend, dynamic=True)
    assert errors(f, compiled, 9) < 1e-9
    assert backend.report.sites[0].mask == "causal"
    assert not warnings()
    backend.c = 2
    assert errors(f, compiled, 9) > 1e-3
    assert errors(f, compiled, 50) < 1e-9
    assert len(warnings()) == 1
    assert "50" in warnings()[0]


def test_a_band_from_the_last_key_is_no_band_from_the_first() -> None:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        m, n = q.shape[2], k.shape[2]
        ahead = torch.arange(n) > torch.arange(m)[:, None] + n - m
        return (q @ k.mT).masked_fill(ahead, -math.inf).softmax(-1) @ v

    torch._dynamo.reset()
    backend = SUSBackend(c=2, compiler="eager")
    compiled = torch.compile(f, backend=backend, dynamic=True)
    for m, n in ((7, 9), (8, 12)):
        q, k = tensors((2, 4, m, 6), (2, 4, n, 6))
        assert not torch.allclose(run(compiled, (q, k, k))[1][0], run(f, (q, k, k))[1][0], rtol=1e-3)
    assert backend.report.sites[0].mask == "mask"
