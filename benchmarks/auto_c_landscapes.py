#!/usr/bin/env python
"""How near c="auto" comes to the best c on simulated landscapes, whose best c is known.

    python benchmarks/auto_c_landscapes.py

150 random landscapes (tests/lightning/landscapes.py), 20 probes each, at three levels of noise of the times and the
variances. Loss is that of progress per second against the best c within the bounds. Writes benchmarks/results/.
"""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "lightning")]

from landscapes import random_world  # noqa: E402

from sus_lightning import AutoC  # noqa: E402

LANDSCAPES, PROBES = 150, 20


def turns(path: list[float]) -> int:
    moves = [a < b for a, b in pairwise(path) if a != b]
    return sum(a != b for a, b in pairwise(moves))


def main() -> None:
    rows = []
    for noise, outliers in ((0.0, 0.0), (0.1, 0.0), (0.3, 0.02)):
        losses, late_turns, late_moves, arrivals, infinite = [], [], [], [], 0
        for seed in range(LANDSCAPES):
            world = random_world(
                seed, says_kept=bool(seed % 2), timing_noise=noise, variance_noise=noise, outliers=outliers
            )
            schedule = AutoC()
            best = world.cost(world.best(schedule.minimum, schedule.maximum))
            path = [schedule(0)]
            for step in range(PROBES):
                schedule.observe(world.probe(schedule(step), schedule.measure_at()))
                path.append(schedule(step))
            losses.append(1 - math.exp(best - world.cost(path[-1])))
            late_turns.append(turns(path[10:]))
            late_moves.append(sum(a != b for a, b in pairwise(path[10:])))
            arrivals.append(next((i for i, c in enumerate(path) if world.cost(c) - best < 0.05), PROBES + 1))
            infinite += math.isinf(path[-1])
        losses.sort()
        arrivals.sort()
        rows.append(
            {
                "noise": noise,
                "outliers": outliers,
                "median loss": losses[LANDSCAPES // 2],
                "95% below": losses[int(0.95 * LANDSCAPES)],
                "largest loss": losses[-1],
                "within 5% of the best": sum(x < 0.05 for x in losses),
                "probes until first within 5%, nine of ten": arrivals[int(0.9 * LANDSCAPES)],
                "moves in the last ten probes, mean": sum(late_moves) / LANDSCAPES,
                "turns in the last ten probes, most": max(late_turns),
                "settled at infinity": infinite,
            }
        )
        print(json.dumps(rows[-1], indent=1), flush=True)
    output = {"landscapes": LANDSCAPES, "probes": PROBES, "rows": rows}
    (ROOT / "benchmarks" / "results" / "auto-c-landscapes.json").write_text(json.dumps(output, indent=1) + "\n")


if __name__ == "__main__":
    main()
