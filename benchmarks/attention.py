"""Forward and backward of `sus_attention` against F.scaled_dot_product_attention, interleaved in one process.

    python benchmarks/attention.py --device cpu                      # all cases
    python benchmarks/attention.py --cases table --repeats 9         # those of the README's table
    python benchmarks/attention.py --cases 'causal n=2048*'          # by name
    python benchmarks/attention.py --list

Before any time is printed, the gradients of the case's features are checked against float64. Every figure is the
median over repetitions of a ratio of neighbours in time, so that load from elsewhere hits both sides. Results go to
benchmarks/results/ as JSON, with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes import sus_attention

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Case:
    """One attention call; `padded` is the share of hidden keys at the end, `table` marks the README's rows.

    `tensor` gives causal and padding to both sides as one M x N tensor: "bool", or "float" with finfo.min; or a learned
    bias per head, query and key: "learned".
    """

    name: str
    n: int
    heads: int
    d: int = 64
    groups: int | None = None
    causal: bool = True
    dtype: str = "float32"
    padded: float = 0.0
    tensor: str = ""
    dropout: float = 0.0
    batch: int = 1
    c: float = 30.0
    forward: str = "auto"
    table: bool = False


_BASE = (
    Case("causal n=2048", 2048, 8, table=True),
    Case("causal n=8192", 8192, 4, table=True),
    Case("causal n=32768", 32768, 2, table=True),
    Case("full n=8192", 8192, 4, causal=False, table=True),
)
CPU_CASES = (
    *_BASE,
    *(replace(x, name=f"{x.name} bfloat16", dtype="bfloat16", table=False) for x in _BASE),
    *(replace(x, name=f"{x.name} d=128", d=128, table=False) for x in _BASE),
    Case("causal n=2048 gqa 9/3", 2048, 9, groups=3),
    Case("causal n=8192 gqa 9/3", 8192, 9, groups=3),
    Case("padding n=2048", 2048, 4, causal=False, padded=0.2, batch=2),
    Case("padding n=8192", 8192, 4, causal=False, padded=0.2),
    *(
        Case(f"mask {tensor} n={n}", n, heads, causal=False, padded=0.125, tensor=tensor)
        for tensor in ("bool", "float")
        for n, heads in ((2048, 8), (8192, 4))
    ),
    *(Case(f"dropout n={n}", n, heads, dropout=0.1) for n, heads in ((2048, 8), (8192, 4))),
    Case("learned bias n=2048", 2048, 8, causal=False, tensor="learned"),
    Case("causal n=8192 library forward", 8192, 4, forward="library"),
)
CUDA_CASES = tuple(replace(x, dtype="bfloat16", d=128, heads=16) for x in _BASE)
CASES = {"cpu": CPU_CASES, "cuda": CUDA_CASES}


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Tensor | None


def make(case: Case, device: str) -> Inputs:
    """Random inputs as projections lay them out. Random attention is diffuse: all c entries of a row are kept."""
    g = torch.Generator(device).manual_seed(0)

    def tensor(heads: int) -> Tensor:
        x = torch.randn(case.batch, case.n, heads, case.d, generator=g, device=device)
        return x.to(getattr(torch, case.dtype)).transpose(1, 2)

    groups = case.groups or case.heads
    q, k, v = (tensor(h).requires_grad_() for h in (case.heads, groups, groups))
    mask = None
    if case.padded:
        mask = torch.ones(case.batch, 1, 1, case.n, dtype=torch.bool, device=device)
        mask[..., round(case.n * (1 - case.padded)) :] = False
    if case.tensor == "learned":
        mask = torch.randn(1, case.heads, case.n, case.n, generator=g, device=device).requires_grad_()
    elif mask is not None and case.tensor:
        mask = mask & torch.ones(case.n, case.n, dtype=torch.bool, device=device).tril()
        if case.tensor == "float":
            mask = torch.zeros(mask.shape, device=device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return Inputs(q, k, v, tensor(case.heads), mask)


def library(case: Case, x: Inputs) -> Tensor:
    gqa, p = case.groups is not None, case.dropout
    return F.scaled_dot_product_attention(x.q, x.k, x.v, x.mask, p, is_causal=case.causal, enable_gqa=gqa)


def sparse(case: Case, x: Inputs, c: float | None = None, seed: int | None = None) -> Tensor:
    return sus_attention(
        x.q, x.k, x.v, x.mask, case.dropout, is_causal=case.causal, enable_gqa=case.groups is not None,
        c=case.c if c is None else c, seed=seed, forward=case.forward,
    )  # fmt: skip


def gradients(out: Tensor, x: Inputs) -> tuple[Tensor, ...]:
    inputs = (x.q, x.k, x.v) if x.mask is None or not x.mask.requires_grad else (x.q, x.k, x.v, x.mask)
    return torch.autograd.grad(out, inputs, x.grad.to(out.dtype))


def with_same_dropout(case: Case, x: Inputs, c: float | None = None, seed: int | None = None) -> Tensor:
    torch.manual_seed(0)
    return sparse(case, x, c, seed)


def check(case: Case, device: str) -> float:
    """Distance of the mean of draws from the float64 gradient, in units of what that many draws leave. About 1.

    Raises:
        AssertionError: the forward is wrong, or the mean is not the gradient.
    """
    small = replace(case, n=300, batch=1)
    x = make(small, device)
    double = Inputs(*(t.detach().double().requires_grad_() for t in (x.q, x.k, x.v)), x.grad.double(), x.mask)
    if x.mask is not None and x.mask.is_floating_point():
        double = replace(double, mask=x.mask.detach().double().requires_grad_(x.mask.requires_grad))
    # The library draws another dropout: PyTorch code at c = inf is then what the kernel is compared with.
    exact_out = with_same_dropout(small, double, float("inf")) if case.dropout else library(small, double)
    exact = gradients(exact_out, double)
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    error = float((with_same_dropout(small, x) - exact_out).detach().abs().max())
    assert error < tolerance, f"{case.name}: the forward is wrong by {error:g}"
    draws = 64
    sums, squares = [torch.zeros_like(e) for e in exact], 0.0
    for seed in range(draws):
        found = gradients(with_same_dropout(small, x, seed=seed), x)
        for total, g, e in zip(sums, found, exact, strict=True):
            total += g
            squares += float((g - e).square().sum())
    error = sum(float((total / draws - e).square().sum()) for total, e in zip(sums, exact, strict=True))
    ratio = (error / (squares / draws / draws)) ** 0.5
    assert ratio < 1.3, f"{case.name}: the mean of {draws} draws is not the gradient ({ratio:.2f})"
    return ratio


def wall(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def device_events(f: Callable[[], object]) -> float:
    """Seconds on the device between two events around f."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    f()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


TIMERS = {"cpu": wall, "cuda": device_events}


def measure(case: Case, device: str, repeats: int) -> dict[str, float]:
    """Medians of the seconds of every part and of the ratios."""
    timer, x = TIMERS[device], make(case, device)
    rounds: list[dict[str, float]] = []
    outs: list[Tensor] = []
    for _ in range(repeats + 1):
        seconds = {"library forward": timer(lambda: outs.append(library(case, x)))}
        seconds["library backward"] = timer(lambda: gradients(outs.pop(), x))
        seconds["forward"] = timer(lambda: outs.append(sparse(case, x)))
        seconds["backward"] = timer(lambda: gradients(outs.pop(), x))
        with torch.no_grad():
            seconds["forward without sampling"] = timer(lambda: sparse(case, x))
        ours = seconds["forward"] + seconds["backward"]
        seconds["speed-up"] = (seconds["library forward"] + seconds["library backward"]) / ours
        seconds["backward / forward"] = seconds["backward"] / seconds["forward"]
        seconds["forward / library forward"] = seconds["forward"] / seconds["library forward"]
        plain = seconds["forward without sampling"]
        seconds["forward without sampling / library forward"] = plain / seconds["library forward"]
        seconds["backward / library forward"] = seconds["backward"] / seconds["library forward"]
        rounds.append(seconds)
    return {key: statistics.median(r[key] for r in rounds[1:]) for key in rounds[0]}


def environment(device: str) -> dict[str, object]:
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    model = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), model)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def earlier(file: Path, where: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of results that were measured in the same way."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    same = all(found["environment"][key] == where[key] for key in ("device", "threads", "torch", "commit"))
    return list(found["rows"]) if same else []


def chosen(cases: tuple[Case, ...], pattern: str) -> list[Case]:
    if pattern == "table":
        return [x for x in cases if x.table]
    return [x for x in cases if fnmatch.fnmatch(x.name, pattern)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    parser.add_argument("--cases", default="*", help="'table', or a pattern of names")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file; default results/attention-DEVICE.json")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    args = parser.parse_args()
    cases = chosen(CASES[args.device], args.cases)
    if args.list:
        print("\n".join(x.name for x in cases))
        return
    rows = []
    print(f"{'case':<32} {'checked':>7} {'speed-up':>8} {'bwd/fwd':>8} {'fwd/lib':>8} {'no smp':>7}   ms lib, ours")
    for case in cases:
        ratio = check(case, args.device)
        r = measure(case, args.device, args.repeats)
        parts = ("library forward", "library backward", "forward", "backward")
        ms = " + ".join(f"{r[key] * 1e3:.1f}" for key in parts)
        print(
            f"{case.name:<32} {ratio:7.2f} {r['speed-up']:8.2f} {r['backward / forward']:8.3f} "
            f"{r['forward / library forward']:8.3f} {r['forward without sampling / library forward']:7.3f}   {ms}",
            flush=True,
        )
        rows.append({**asdict(case), "check": ratio, **r})
        output = args.output or RESULTS / f"attention-{args.device}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"environment": environment(args.device), "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
