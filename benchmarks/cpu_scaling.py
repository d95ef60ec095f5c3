"""Time and memory of the sparse backward from n = 4096 to 65536, and the slope on a log-log plot: of the times, the
median over the rounds of the slope within a round.

python benchmarks/cpu_scaling.py            # measures (minutes), writes results/cpu-scaling.json and the picture
python benchmarks/cpu_scaling.py --plot     # the picture alone, from the JSON
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from attention import environment
from torch import Tensor

from fx_passes import sus_attention
from fx_passes.ops.cpu import release_memory

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/cpu-scaling.json"
PICTURE = ROOT / "docs/img/cpu-scaling.png"
LENGTHS = (4096, 8192, 16384, 32768, 65536)
HEADS, WIDTH, BUDGET = 2, 64, 30.0


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is the memory in use now, VmHWM its maximum."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


@dataclass
class Length:
    """One problem, and what was measured of its backward."""

    out: Tensor
    inputs: tuple[Tensor, ...]
    grad: Tensor
    memory: int = 0  # bytes
    cpu: list[float] = field(default_factory=list)  # seconds of all threads: time that others take does not count
    wall: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, n: int) -> Length:
        g = torch.Generator().manual_seed(0)
        q, k, v, grad = (torch.randn(1, n, HEADS, WIDTH, generator=g).transpose(1, 2) for _ in range(4))
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        return cls(sus_attention(*inputs, is_causal=True, c=BUDGET), inputs, grad)

    def backward(self) -> None:
        torch.autograd.grad(self.out, self.inputs, self.grad, retain_graph=True)

    def measure_memory(self) -> None:
        """The most that the backward has besides its inputs, with the lists that it was left; also a warm-up."""
        release_memory()  # what earlier runs have left or freed would be taken without being seen
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before = memory("VmRSS")
        self.backward()
        rows = HEADS * self.out.shape[2]
        self.memory = memory("VmHWM") - before + rows * 8 * (int(BUDGET) + 1)

    def measure_time(self) -> None:
        cpu, wall = time.process_time(), time.perf_counter()
        self.backward()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    def row(self) -> dict[str, float]:
        """The fastest, since load of others only adds, and the medians."""
        middle = {f"{name}_median": statistics.median(x) for name, x in (("cpu", self.cpu), ("wall", self.wall))}
        return {"n": self.out.shape[2], "cpu": min(self.cpu), "wall": min(self.wall), **middle, "memory": self.memory}


def measure(rounds: int) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """All lengths in turn, round by round: a noisy minute hits all of them. Rows, and the slopes within each round."""
    lengths = [Length.of(n) for n in LENGTHS]
    for length in lengths:
        length.measure_memory()
    for _ in range(rounds):
        for length in lengths:
            length.measure_time()
    times = {"cpu": zip(*(x.cpu for x in lengths), strict=True), "wall": zip(*(x.wall for x in lengths), strict=True)}
    slopes = {name: [slope(LENGTHS, seconds) for seconds in rounds] for name, rounds in times.items()}
    return [length.row() for length in lengths], slopes


def slope(lengths: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log(value) over log(length)."""
    x, y = ([math.log(number) for number in numbers] for numbers in (lengths, values))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def plot(rows: list[dict[str, float]], slopes: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = [r["n"] for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    parts = (
        ("wall_median", "wall", 1e3, "backward, ms, median"),
        ("memory", "memory", 2**-20, "working memory and lists, MiB"),
    )
    for axis, (key, name, unit, label) in zip(axes, parts, strict=True):
        axis.loglog(n, [r[key] * unit for r in rows], "o-", label=f"measured, slope {slopes[name]:.2f}")
        axis.loglog(n, [rows[0][key] * unit * x / n[0] for x in n], "k:", label="slope 1")
        axis.set_xlabel("sequence length n")
        axis.set_ylabel(label)
        axis.set_xticks(n, [str(int(x)) for x in n])
        axis.minorticks_off()
        axis.legend()
    figure.suptitle("Sparse backward, c = 30, 2 heads, d = 64, float32, causal, random inputs")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw the picture from the JSON, measure nothing")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    if not args.plot:
        rows, rounds = measure(args.rounds)
        slopes = {"memory": slope(LENGTHS, [r["memory"] for r in rows])}
        for name, values in rounds.items():
            low, middle, high = statistics.quantiles(values, n=4)
            slopes |= {f"{name} lower quartile": low, name: middle, f"{name} upper quartile": high}
        result = {"environment": environment("cpu"), "rounds": args.rounds, "slopes": slopes, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        for r in rows:
            entry = 1e9 / (r["n"] * HEADS * BUDGET)
            print(f"n {r['n']}: CPU {r['cpu'] * entry:.1f} ns per entry (median {r['cpu_median'] * entry:.1f})")
        print(slopes)
    result = json.loads(RESULT.read_text())
    plot(result["rows"], result["slopes"])


if __name__ == "__main__":
    main()
