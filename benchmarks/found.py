"""Keeps what the project's zoo of models measured, for the table of docs/found.md.

    python benchmarks/found.py --zoo ZOO --results ZOO.json --commit HASH

The zoo is not part of this repository. It runs each model in a process of its own: plain, then by SUSBackend at
c = inf, which has to give the same loss and gradients ("exact"), then at c = 2, where gradients should change. What it
wrote is --results. Attentions count as found only in entries that are exact; those whose gradients c = 2 did not change
are marked "unchanged".
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from attention import RESULTS

PACKAGES = ("torch", "transformers", "timm", "x-transformers", "torchvision")


def entry(name: str, truth: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """One model: what it has, and what was found."""
    exact = bool(result.get("exact"))
    found = min(result["found"], truth["attention"]) if exact else 0
    more = {"error": result["error"]} if "error" in result else {}
    if found and not result["active"]:
        more["unchanged"] = True
    return {
        "name": name,
        "family": truth["family"],
        "attentions": truth["attention"],
        "found": found,
        "exact": exact,
        "false": max(0, result.get("found", 0) - truth["attention"]),
        **more,
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--zoo", type=Path, required=True, help="folder with truth.json")
    p.add_argument("--results", type=Path, required=True, help="what its run.py wrote")
    p.add_argument("--commit", required=True, help="of this repository, that was measured")
    a = p.parse_args()
    truth, results = (json.loads(file.read_text()) for file in (a.zoo / "truth.json", a.results))
    counted = {name: t for name, t in truth.items() if t.get("optional") != 2}  # those count neither way
    entries = [entry(name, t, results[name]) for name, t in counted.items() if name in results]
    totals = {
        "entries": len(entries),
        "of": len(counted),
        **{key: sum(e[key] for e in entries) for key in ("attentions", "found", "false")},
    }
    totals["unchanged"] = sum("unchanged" in e for e in entries)
    totals["share"] = totals["found"] / totals["attentions"]
    packages = {package: installed(package) for package in PACKAGES}
    lines = ",\n  ".join(json.dumps(e) for e in entries)
    head = json.dumps({"commit": a.commit, "packages": packages, "totals": totals}, indent=1).removesuffix("\n}")
    (RESULTS / "zoo.json").write_text(f'{head},\n "entries": [\n  {lines}\n ]\n}}\n')
    print(totals)


if __name__ == "__main__":
    main()
