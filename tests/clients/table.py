"""Writes the table of docs/clients.md from what train.py found. Usage: python -m tests.clients.table RESULTS.json"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"
PACKAGES = {"darts": "u8darts"}


def row(name: str, result: dict[str, Any]) -> str:
    library, model = name.split(" ", 1)
    package = f"{library} {version(PACKAGES.get(library, library))}"
    if "error" in result:
        return f"| {package} | {model} | {result['error'].split(':')[0]} | | |\n"
    found = f"{result['rewritten']} of {result['attentions']}"
    return f"| {package} | {model} | {found} | {result['difference']:.0e} | {result['after']} |\n"


def main(file: str) -> None:
    results = json.loads(Path(file).read_text())
    head = "| library | model | rewritten | loss at c = inf | save, load, predict |\n|---|---|---|---|---|\n"
    page = PAGE.read_text()
    before, rest = page.split(START)
    PAGE.write_text(before + START + head + "".join(row(*item) for item in results.items()) + END + rest.split(END)[1])


if __name__ == "__main__":
    main(sys.argv[1])
