#!/usr/bin/env python
"""Puts the numbers of benchmarks/results/ into README.md and docs/*.md, or says where text and results differ.

    python benchmarks/doc_numbers.py             # prints what differs; exit status 1 if anything does
    python benchmarks/doc_numbers.py --write     # writes it

A number stands between two comments, of which the first says where it comes from and how it is shown:

    <!-- number: cpu-scaling > slopes > wall > .2f -->1.04<!-- /number -->
    <!-- number: variance-smollm2 > rows > n=2048 > sampler=tile > c=30 > total > .1% -->0.3%<!-- /number -->

The file's name comes first, the format of Python's `format` last. Between them are keys; `key=value` chooses from a
list the items with that value, and a number chooses by position. One item has to be left. A table has a name, and the
function of that name in benchmarks/doc_tables.py writes it:

    <!-- table: train_quality -->
    ...
    <!-- /table -->
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import doc_tables as tables
import doc_tables_site

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- (number|table): (.+?) -->(.*?)<!-- /\1 -->", re.DOTALL)
OPENED = re.compile(r"<!-- (?:number: |table: |/number|/table)")


@cache
def results(name: str) -> Any:
    """A file of benchmarks/results/, read once."""
    found = tables.read(name)
    if found is None:
        raise ValueError(f"no results {name!r}")
    return found


def number(source: str) -> str:
    """What a marker's text has to be.

    Raises:
        ValueError: a key is unknown, or not one item is left.
    """
    name, *keys, shown = source.split(" > ")
    found = results(name)
    for key in keys:
        wanted, equals, value = key.partition("=")
        if isinstance(found, list) and equals:
            found = [x for x in found if same(x.get(wanted), value)]
            continue
        if isinstance(found, list) and not key.lstrip("-").isdigit():
            found = only(found, source)
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (KeyError, IndexError) as error:
            raise ValueError(f"{source!r}: no {key!r}") from error
    found = only(found, source) if isinstance(found, list) else found
    if isinstance(found, dict) or found is None:
        raise ValueError(f"{source!r} is no number")
    return format(found, shown)


def only(items: list[Any], source: str) -> Any:
    if len(items) != 1:
        raise ValueError(f"{source!r}: {len(items)} items where one is wanted")
    return items[0]


def same(item: Any, value: str) -> bool:
    if isinstance(item, (int, float)) and not isinstance(item, bool):
        try:
            return float(item) == float(value)
        except ValueError:
            return False
    return str(item) == value


def table(name: str) -> str:
    known = {**tables.TABLES, **doc_tables_site.TABLES}
    if name not in known:
        raise ValueError(f"no table {name!r}: there are {', '.join(sorted(known))}")
    return f"\n{known[name]()}\n"


def filled(text: str) -> str:
    """The text with all numbers and tables as the results have them.

    Raises:
        ValueError: a marker is not closed, or names what is not there.
    """
    if len(OPENED.findall(text)) != 2 * len(MARK.findall(text)):
        raise ValueError("a marker is not opened or not closed as its kind needs")

    def replaced(match: re.Match[str]) -> str:
        kind, source, _ = match.groups()
        content = number(source) if kind == "number" else table(source)
        return f"<!-- {kind}: {source} -->{content}<!-- /{kind} -->"

    return MARK.sub(replaced, text)


def differences(file: Path) -> list[str]:
    """One line for each number or table of the file that is not what the results say."""
    try:
        now, wanted = file.read_text(), filled(file.read_text())
    except ValueError as error:
        return [f"{file.name}: {error}"]
    pairs = zip(MARK.findall(now), MARK.findall(wanted), strict=True)
    return [f"{file.name}: {kind} {source}: {a!r}, not {b!r}" for (kind, source, a), (_, _, b) in pairs if a != b]


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--write", action="store_true")
    a = p.parse_args()
    if a.write:
        for file in documents():
            text = filled(file.read_text())
            if text != file.read_text():
                file.write_text(text)
                print(f"written: {file.relative_to(ROOT)}")
        return 0
    found = [line for file in documents() for line in differences(file)]
    print("\n".join(found) or "no difference")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
