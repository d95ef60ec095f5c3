"""Inductor's cache of compiled graphs: used again by the same pass, not by another version of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from fx_passes import SUSBackend
from fx_passes.rewrite import graph


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def misses(backend: SUSBackend) -> int:
    """Graphs (forward and backward) that are compiled for one step and were not in the cache."""
    torch._dynamo.reset()
    counters.clear()
    q, k, v = (torch.ones(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    torch.compile(attention, backend=backend)(q, k, v).sum().backward()
    assert backend.report.rewritten == 1
    return counters["inductor"]["fxgraph_cache_miss"]


def test_another_version_of_the_pass_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SUSBackend(c=2)
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=False):
        assert misses(backend) == 2
        assert misses(backend) == 0
        monkeypatch.setattr(graph, "_source", lambda: b"another version")
        assert misses(backend) == 2
