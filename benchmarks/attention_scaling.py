#!/usr/bin/env python
"""Forward and backward of attention against n: the library's, that under Inductor, and SUS, with log-log slopes.

    OMP_NUM_THREADS=1 python benchmarks/attention_scaling.py                       # minutes, n = 1024 to 65536
    OMP_NUM_THREADS=1 python benchmarks/attention_scaling.py --n 1024 4096 --dtypes float32

One causal head of size 64, random q, k, v (diffuse attention: all c entries are kept), c = 30. The three take turns in
one process; seconds are CPU time on one thread, since other programs may use the machine, and a ratio is the median
over the rounds of the ratio within a round. Memory is the most that forward and backward take beyond their inputs.
Results go to benchmarks/results/attention-scaling.json, after every length. Rows that the file has from the same commit
and machine stay: after a cut, name the n that are left.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import RESULTS, Case, Inputs, check, earlier, environment, gradients, library, make, sparse
from cpu_scaling import memory, slope

from fx_passes.ops.cpu import release_memory

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
RESULT = RESULTS / "attention-scaling.json"
NAMES = ("library", "library under Inductor", "SUS")
WORK = 16384  # rounds are as many as do about the work of three at this length, between 1 and 9


def contenders(case: Case, x: Inputs) -> dict[str, Callable[[], object]]:
    compiled = torch.compile(lambda: library(case, x))
    return {
        "library": lambda: gradients(library(case, x), x),
        "library under Inductor": lambda: gradients(compiled(), x),
        "SUS": lambda: gradients(sparse(case, x), x),
    }


def cpu(f: Callable[[], object]) -> float:
    start = time.process_time()
    f()
    return time.process_time() - start


def peak(f: Callable[[], object]) -> int:
    """Bytes that f has at most beyond what was there before. Small ones are in the allocator's leftovers: not seen."""
    release_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = memory("VmRSS")
    f()
    return memory("VmHWM") - before


def measure(case: Case) -> dict[str, Any]:
    torch._dynamo.reset()
    rounds = min(9, max(1, round(3 * (WORK / case.n) ** 2)))
    functions = contenders(case, make(case, "cpu"))
    for name in NAMES:
        if rounds > 1 or name != "library":
            functions[name]()  # compiles; at the largest length the library alone is not run once more for nothing
    kept = {name: peak(functions[name]) for name in NAMES} if rounds > 1 else dict.fromkeys(NAMES)
    turns = [{name: cpu(functions[name]) for name in NAMES} for _ in range(rounds)]
    return {
        "n": case.n,
        "dtype": case.dtype,
        "rounds": rounds,
        "seconds": {name: statistics.median(t[name] for t in turns) for name in NAMES},
        "speed-up": {name: statistics.median(t[name] / t["SUS"] for t in turns) for name in NAMES[:2]},
        "lowest": {name: min(t[name] / t["SUS"] for t in turns) for name in NAMES[:2]},
        "highest": {name: max(t[name] / t["SUS"] for t in turns) for name in NAMES[:2]},
        "memory": kept,
    }


def slopes(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of seconds over n, by dtype and contender, from 4096 on: below, what does not grow with n counts."""
    found: dict[str, dict[str, float]] = {}
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        large = [r for r in rows if r["dtype"] == dtype and r["n"] >= 4096]
        if len(large) > 1:
            lengths = [r["n"] for r in large]
            found[dtype] = {name: slope(lengths, [r["seconds"][name] for r in large]) for name in NAMES}
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--n", type=int, nargs="+", default=LENGTHS)
    p.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    p.add_argument("--output", type=Path, default=RESULT)
    a = p.parse_args()
    if torch.get_num_threads() > 1:
        raise SystemExit("CPU time is a call's time on one thread only: OMP_NUM_THREADS=1")
    rows, checks = earlier(a.output, environment("cpu")), {}
    for n in a.n:  # by length first: a run that is cut has both dtypes
        for dtype in a.dtypes:
            case = Case(f"causal n={n}", n, 1, dtype=dtype)
            if dtype not in checks:
                checks[dtype] = check(case, "cpu")
            r = measure(case)
            rows = [*(x for x in rows if (x["n"], x["dtype"]) != (n, dtype)), r]
            print(
                n, dtype, *(f"{name} {s * 1e3:.1f} ms" for name, s in r["seconds"].items()), r["speed-up"], flush=True
            )
            load = os.getloadavg()[0]
            result = {"environment": {**environment("cpu"), "load": load}, "clock": "CPU time of one thread"}
            result |= {"heads": 1, "d": 64, "c": 30, "causal": True, "checks": checks, "slopes": slopes(rows)}
            a.output.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
