"""The table of rules: one for each operator and domain; and who imports whom."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import fx_passes.find
from fx_passes.canonicalise import rules


def test_find_imports_nothing_of_what_follows() -> None:
    for file in Path(fx_passes.find.__path__[0]).glob("*.py"):
        imported = [n.module or "" for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        assert not [name for name in imported if name.startswith(("fx_passes.canonicalise", "fx_passes.rewrite"))], file


@pytest.mark.parametrize("column", [1, 2])
def test_an_operator_has_one_rule_for_each_domain(column: int) -> None:
    rows = Counter(op for row in rules._TABLE if row[column] is not None for op in row[0])
    assert rows
    assert max(rows.values()) == 1
