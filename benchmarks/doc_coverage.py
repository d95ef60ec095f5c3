"""Keeps what `coverage json` measured, per folder, for the table of docs/tests.md; .ci/coverage runs it.

python benchmarks/doc_coverage.py COVERAGE.JSON
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from doc_tables import RESULTS


def folders(files: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each folder: lines, branches, and the share of both together that ran."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, file in sorted(files.items()):
        s = file["summary"]
        ran = s["covered_lines"] + s["covered_branches"]
        for folder in (str(Path(name).parent), "all"):
            for i, n in enumerate((s["num_statements"], s["num_branches"], ran)):
                counts[folder][i] += n
    counts["all"] = counts.pop("all")  # last
    return {
        folder: {"lines": lines, "branches": branches, "covered": ran / (lines + branches)}
        for folder, (lines, branches, ran) in counts.items()
        if lines
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("report", type=Path)
    measured = json.loads(p.parse_args().report.read_text())
    result = {
        "date": measured["meta"]["timestamp"][:10],
        "torch": torch.__version__,
        "folders": folders(measured["files"]),
    }
    (RESULTS / "coverage.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['folders']['all']['covered']:.1%} of lines and branches ran")


if __name__ == "__main__":
    main()
