"""The numbers in README.md and docs/ are those of benchmarks/results/ (see benchmarks/doc_numbers.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="no benchmarks beside the tests")
sys.path.insert(0, str(BENCHMARKS))

import doc_numbers  # noqa: E402
import doc_typed  # noqa: E402


@pytest.mark.parametrize("file", doc_numbers.documents(), ids=lambda file: file.name)
def test_text_says_what_the_results_say(file):
    assert doc_numbers.differences(file) == []


@pytest.mark.parametrize("file", doc_numbers.documents(), ids=lambda file: file.name)
def test_no_measured_number_is_typed(file):
    text = file.read_text()
    assert doc_typed.typed(file.name, text) == []
    assert [words for words in doc_typed.allowed(file.name) if words not in text] == []  # no longer needed


@pytest.mark.parametrize(
    "number", ["1.7x", "12%", "34 ms", "5.6 s", "120 MiB", "1.5 GB", "0.95", "3 minutes", "150 GFLOP/s", "173 passed"]
)
def test_a_typed_number_is_seen(number):
    (seen,) = doc_typed.typed(
        "page.md", f"`7 ms` and\n<!-- number: a > d -->8<!-- /number -->x; it took {number} here, on torch 2.13.0."
    )
    assert number in seen


@pytest.mark.parametrize("file", doc_numbers.documents(), ids=lambda file: file.name)
def test_no_line_begins_with_a_number(file):
    """Markdown takes a comment at the start of a line as a block of HTML, which ends the paragraph."""
    assert not [line for line in file.read_text().splitlines() if line.lstrip().startswith("<!-- number")]


def test_a_number_that_differs_is_named_and_written(tmp_path):
    right = doc_numbers.number("probe > probe over step > .2f")
    source = "probe > probe over step > .2f"
    file = tmp_path / "page.md"
    file.write_text(f"It is <!-- number: {source} -->9.99<!-- /number -->x as fast.")
    assert doc_numbers.differences(file) == [f"page.md: number {source}: '9.99', not '{right}'"]
    file.write_text(doc_numbers.filled(file.read_text()))
    assert doc_numbers.differences(file) == []
    assert f"-->{right}<!--" in file.read_text()


def test_items_of_lists_are_chosen_by_value():
    by_value = doc_numbers.number("variance-smollm2 > rows > n=2048 > sampler=tile > c=30 > total > .6f")
    rows = doc_numbers.results("variance-smollm2")["rows"]
    assert by_value == f"{next(r['total'] for r in rows if (r['n'], r['sampler'], r['c']) == (2048, 'tile', 30)):.6f}"


@pytest.mark.parametrize("name", sorted(doc_numbers.tables.TABLES))
def test_a_table_has_cells_in_every_line(name):
    lines = [line for line in doc_numbers.table(name).splitlines() if "|" in line]
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- number: probe > overhead > d -->1", "not closed"),
        ("<!-- number: nowhere > n > d -->1<!-- /number -->", "no results 'nowhere'"),
        ("<!-- number: probe > m > d -->1<!-- /number -->", "no 'm'"),
        ("<!-- number: variance-smollm2 > rows > n=2048 > c=30 > total > .1% -->1<!-- /number -->", "3 items"),
        ("<!-- number: probe > environment > d -->1<!-- /number -->", "is no number"),
        ("<!-- table: nothing -->\n<!-- /table -->", "no table 'nothing'"),
    ],
)
def test_what_a_marker_cannot_mean_is_said(tmp_path, text, message):
    file = tmp_path / "page.md"
    file.write_text(text)
    (line,) = doc_numbers.differences(file)
    assert message in line
