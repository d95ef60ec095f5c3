"""The table of rules: one for each operator and domain, and each value is read once."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import fx_passes.find
from fx_passes.canonicalise import rules
from fx_passes.canonicalise.reader import ScoresReader
from tests.passes.harness import compare, tensors


def test_find_imports_nothing_of_what_follows() -> None:
    for file in Path(fx_passes.find.__path__[0]).glob("*.py"):
        imported = [n.module or "" for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in imported if name.startswith(("fx_passes.canonicalise", "fx_passes.rewrite"))], file


@pytest.mark.parametrize("column", [1, 2])
def test_an_operator_has_one_rule_for_each_domain(column: int) -> None:
    rows = Counter(op for row in rules._TABLE if row[column] is not None for op in row[0])
    assert rows
    assert max(rows.values()) == 1


def test_each_value_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where scores branch and join again, and so at each of ten operations."""
    seen: Counter[tuple[Any, ...]] = Counter()
    read = ScoresReader._read

    def counted(reader: ScoresReader, value: Any, layout: Any) -> Any:
        seen[id(reader), value, layout] += 1
        return read(reader, value, layout)

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        s = q @ k.mT
        for _ in range(10):
            s = s + s * 0.1
        return s.softmax(-1) @ v

    monkeypatch.setattr(ScoresReader, "_read", counted)
    assert compare(f, *tensors(*[(2, 3, 5)] * 3)).rewritten == 1
    assert sum(seen.values()) < 200
    assert max(seen.values()) == 1
