"""Time and memory of the sparse backward from n = 4096 to 65536, and the slope on a log-log plot.

python benchmarks/cpu_scaling.py            # measures (minutes), writes results/cpu-scaling.json and the picture
python benchmarks/cpu_scaling.py --plot     # the picture alone, from the JSON
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
from attention import environment

from fx_passes import sus_attention

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks/results/cpu-scaling.json"
PICTURE = ROOT / "docs/img/cpu-scaling.png"
LENGTHS = (4096, 8192, 16384, 32768, 65536)


def memory(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS is the memory in use now, VmHWM its maximum."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(n: int, repeats: int) -> dict[str, float]:
    """Median of the backward's CPU seconds (load of others does not count) and of wall seconds; memory in bytes."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=g).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(1, n, 2, 64, generator=g).transpose(1, 2)
    out = sus_attention(q, k, v, is_causal=True, c=30.0)
    cpu, wall, peak = [], [], []
    for _ in range(repeats + 1):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        before, c0, w0 = memory("VmRSS"), time.process_time(), time.perf_counter()
        torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
        cpu.append(time.process_time() - c0)
        wall.append(time.perf_counter() - w0)
        peak.append(memory("VmHWM") - before)
    lists = 30 * 2 * n * 8 + 2 * n * 8
    return {
        "n": n,
        "cpu": statistics.median(cpu[1:]),
        "wall": statistics.median(wall[1:]),
        "memory": max(peak) + lists,
    }


def slope(rows: list[dict[str, float]], key: str) -> float:
    """Least-squares slope of log(key) over log(n)."""
    x, y = ([math.log(r[k]) for r in rows] for k in ("n", key))
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    top = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return top / sum((a - mean_x) ** 2 for a in x)


def plot(result: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    n = [r["n"] for r in rows]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    parts = (("cpu", 1e3, "backward, CPU ms"), ("memory", 2**-20, "backward, working memory and lists, MiB"))
    for axis, (key, unit, label) in zip(axes, parts, strict=True):
        axis.loglog(n, [r[key] * unit for r in rows], "o-", label=f"measured, slope {slope(rows, key):.2f}")
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
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not args.plot:
        rows = [measure(n, args.repeats) for n in LENGTHS]
        slopes = {key: slope(rows, key) for key in ("cpu", "wall", "memory")}
        RESULT.write_text(
            json.dumps({"environment": environment("cpu"), "slopes": slopes, "rows": rows}, indent=1) + "\n"
        )
        print(slopes)
    plot(json.loads(RESULT.read_text()))


if __name__ == "__main__":
    main()
