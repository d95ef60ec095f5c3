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
