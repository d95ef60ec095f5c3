"""Each value is read once, so that reading takes time in proportion to the graph."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from fx_passes import SUSBackend
from fx_passes.canonicalise.axes import Operand
from fx_passes.canonicalise.reader import Reader
from tests.passes.harness import compare, tensors


def read_by_all(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[Any, ...]]:
    """How often each reader has read each value."""
    seen: Counter[tuple[Any, ...]] = Counter()
    read = Reader._read
    alive = []

    def counted(reader: Reader[Any], x: Operand) -> Any:
        alive.append((reader, x))
        seen[id(reader), x] += 1
        return read(reader, x)

    monkeypatch.setattr(Reader, "_read", counted)
    return seen


def test_each_value_is_read_once_where_scores_branch_and_join(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT
        for _ in range(10):
            s = s * 0.1 + s
        return s.softmax(-1) @ v

    seen = read_by_all(monkeypatch)
    assert compare(f, *tensors(*[(2, 3, 5)] * 3)).rewritten == 1
    assert sum(seen.values()) < 200
    assert max(seen.values()) == 1


def test_reading_is_linear_in_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that share a bias and a mask, each of whose input is the one before's result."""

    def deep(layers: int) -> int:
        def f(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            hidden = torch.ones(3, 3, dtype=torch.bool).triu(1)
            for _ in range(layers):
                s = (x @ x.mT / 2 + bias.exp()).masked_fill(hidden, -torch.inf)
                x = x + s.softmax(-1) @ x
            return x

        seen.clear()
        backend = SUSBackend(c=float("inf"), compiler="eager")
        torch._dynamo.reset()
        torch.compile(f, backend=backend)(*tensors((2, 3, 5), (3, 3)))
        assert backend.report.rewritten == layers
        assert max(seen.values()) == 1
        return sum(seen.values())

    seen = read_by_all(monkeypatch)
    two, eight, many = (deep(layers) for layers in (2, 8, 32))
    each = (eight - two) / 6
    assert (many - eight) / 24 == each < 40
