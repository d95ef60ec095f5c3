"""Gradients against float64: exact at c = inf, right in the mean at a small c, equal for equal seeds, replayed anew."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fx_passes import SUSBackend, sus_attention
from fx_passes.state import State

from .calls import Shape, inputs, samplers
from .rows import Row, Session

DIRECTIONS = 8
LARGEST_Z = 5.0


@dataclass(frozen=True)
class Case:
    """
    Attributes:
        c: small, so that most is left out; "tile", which keeps 64 keys at a time, gets half of it.
        seeds: number of draws whose mean is taken.
        hidden: share of keys that a bool mask hides at each sequence's end, with the causal part if there is.
    """

    name: str
    shape: Shape
    c: float
    seeds: int
    hidden: float = 0.0

    def c_of(self, sampler: str) -> float:
        return self.c / 2 if sampler == "tile" else self.c


def cases(session: Session) -> list[Case]:
    if session.tiny:
        shape = Shape(160, 32, 4, 2, dtype="float32")
        return [
            Case("causal gqa", shape, 3, 24),
            Case("padding", replace(shape, batch=2, kind="diffuse", causal=False, n=100), 3, 24, hidden=0.3),
            Case("bfloat16 sink", replace(shape, dtype="bfloat16", kind="sink"), 3, 24),
        ]
    small = Shape(1024, 64, 8, 2)
    large = Shape(8192, 128, 4, 2)
    return [
        Case("gqa bfloat16 d=64", small, 2, 128),
        Case("bfloat16 d=128", replace(small, d=128, heads=4, kv_heads=4), 2, 128),
        Case("bfloat16 n=8192 d=128", large, 10, 48),
        Case("float32 d=64", replace(small, dtype="float32"), 2, 128),
        Case("float16 d=128", replace(small, d=128, dtype="float16", heads=4), 2, 128),
        Case("padding", replace(small, batch=2, causal=False, kind="diffuse"), 2, 128, hidden=0.3),
        Case("padding and causal d=128", replace(small, batch=2, d=128), 2, 128, hidden=0.3),
        Case("sink", replace(small, kind="sink"), 2, 128),
        Case("n=1000 d=80", replace(small, n=1000, d=80), 2, 128),
        Case("diffuse float32 d=128", replace(small, d=128, dtype="float32", kind="diffuse"), 2, 128),
        Case("sink n=8192 d=64", replace(large, d=64, kind="sink"), 10, 48),
        Case("padding n=8192 d=64", replace(large, d=64, causal=False), 10, 48, hidden=0.3),
        Case("float16 n=8192 d=64 diffuse", replace(large, d=64, dtype="float16", kind="diffuse"), 10, 48),
    ]


def mask_of(case: Case, device: str) -> Tensor | None:
    """Bool [batch, 1, 1 or n, n]; sequences hide shares between half of `hidden` and all of it."""
    if not case.hidden:
        return None
    n, batch = case.shape.n, case.shape.batch
    shares = torch.linspace(1, 0.5, batch, device=device) * case.hidden
    mask = torch.arange(n, device=device) < (n * (1 - shares))[:, None, None, None]
    return mask & torch.ones(n, n, dtype=torch.bool, device=device).tril() if case.shape.causal else mask


class Call:
    """One case's tensors and what they give by the library in float64, by the library, and by SUS."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        *self.qkv, self.grad = inputs(case.shape, device)
        self.mask = mask_of(case, device)
        self.options: dict[str, Any] = {"attn_mask": self.mask, "is_causal": case.shape.causal and self.mask is None}
        self.options["enable_gqa"] = case.shape.heads != case.shape.kv_heads

    def _gradients(self, out: Tensor, qkv: list[Tensor]) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, qkv, self.grad.to(out.dtype))]

    def exact(self) -> list[Tensor]:
        """Output and gradients in float64, of the inputs as they are rounded."""
        wide = [x.detach().double().requires_grad_() for x in self.qkv]
        with sdpa_kernel(SDPBackend.MATH):
            return self._gradients(scaled_dot_product_attention(*wide, **self.options), wide)

    def library(self) -> list[Tensor]:
        return self._gradients(scaled_dot_product_attention(*self.qkv, **self.options), self.qkv)

    def sus(self, sampler: str, c: float, seed: int, state: int = 0) -> list[Tensor]:
        return self._gradients(
            sus_attention(*self.qkv, **self.options, c=c, sampler=sampler, seed=seed, state=state), self.qkv
        )


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def short(x: float) -> float:
    return float(f"{x:.3g}")


def at_infinity(call: Call, exact: list[Tensor], sampler: str) -> Row:
    """Errors of out, dQ, dK, dV at c = inf beside those of the library's own backward."""
    library, ours = call.library(), call.sus(sampler, math.inf, 1)
    theirs = [error(x, e) for x, e in zip(library, exact, strict=True)]
    errors = [error(x, e) for x, e in zip(ours, exact, strict=True)]
    return {
        "check": "c = inf",
        "errors": [short(x) for x in errors],
        "library_errors": [short(x) for x in theirs],
        "equal_bits": [torch.equal(a, b) for a, b in zip(ours, library, strict=True)],
        "ok": all(own <= 1.5 * their + 1e-5 for own, their in zip(errors, theirs, strict=True)),
    }


def equal_seeds(call: Call, sampler: str) -> Row:
    one, two, other = (call.sus(sampler, call.case.c_of(sampler), seed) for seed in (1, 1, 2))
    same = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    forward = torch.equal(one[0], call.library()[0])
    differs = not torch.equal(one[2], other[2])
    everything = torch.equal(one[2], call.sus(sampler, float("inf"), 1)[2])  # kept: no draw can differ
    row = {"check": "seeds", "same_seed_equal_bits": same, "other_seed_differs": differs, "kept_everything": everything}
    return {**row, "forward_bits_of_library": forward, "ok": same and (differs or everything)}


@dataclass
class Mean:
    """Sums over draws of one gradient: what its mean deviates by, and along fixed directions.

    `allowed` is what rounding may add to the mean's deviation: that of the library in the same dtype.
    """

    right: Tensor
    allowed: float
    directions: Tensor
    total: Tensor
    squares: float = 0.0
    draws: int = 0

    @staticmethod
    def of(right: Tensor, allowed: float) -> Mean:
        """The first direction is the gradient itself: a factor, the likeliest bias, shows there."""
        g = torch.Generator(right.device).manual_seed(0)
        along = torch.randn(DIRECTIONS, right.numel(), generator=g, device=right.device, dtype=torch.float32)
        along /= along.norm(dim=1, keepdim=True)
        along[0] = (right / right.norm()).flatten()
        return Mean(right, allowed, along, torch.zeros_like(right))

    def add(self, found: Tensor) -> Tensor:
        """Takes a draw in; returns its deviations along the directions."""
        deviation = found.double() - self.right
        self.total += deviation
        self.squares += float(deviation.square().sum())
        self.draws += 1
        return self.directions @ deviation.flatten().float()

    def norm(self) -> tuple[float, float]:
        """Deviation of the mean from the exact gradient, and the one expected of that many draws and of rounding."""
        expected = math.sqrt(self.squares / self.draws**2 + (self.allowed * float(self.right.norm())) ** 2)
        return float(self.total.norm()) / self.draws, expected


def standard_errors(samples: Tensor, mean: Mean) -> Tensor:
    """Of the mean deviation along each direction, rounding included: [draws, directions] -> [directions].

    Rounding's part: a quarter of all of it along the gradient, four times its share of one axis along the others.
    """
    size = float(mean.right.norm()) * mean.allowed
    rounding = torch.full((DIRECTIONS,), 4 * size / math.sqrt(mean.right.numel()), device=samples.device)
    rounding[0] = size / 4
    return (samples.double().var(0) / len(samples) + rounding.square() + 1e-24).sqrt()


def z_scores(samples: Tensor, mean: Mean) -> Tensor:
    """Mean deviation along each direction, in standard errors."""
    return samples.double().mean(0) / standard_errors(samples, mean)


def mean_over_seeds(call: Call, exact: list[Tensor], library: list[Tensor], sampler: str) -> Row:
    """The mean of the draws approaches the exact gradient as 1 / sqrt(draws), within its standard error."""
    c = call.case.c_of(sampler)
    state = State(c)
    right = exact[1:]
    means = [Mean.of(e, error(x, e)) for e, x in zip(right, library[1:], strict=True)]
    samples: list[list[Tensor]] = [[] for _ in means]
    fall: Row = {}
    for seed in range(call.case.seeds):
        found = call.sus(sampler, c, seed, state.id)[1:]
        for x, mean, kept in zip(found, means, samples, strict=True):
            kept.append(mean.add(x))
        if seed + 1 in (call.case.seeds // 8, call.case.seeds):
            fall[str(seed + 1)] = [short(a / b) for a, b in (mean.norm() for mean in means)]
    scores = [z_scores(torch.stack(kept), mean) for kept, mean in zip(samples, means, strict=True)]
    worst = [short(float(z.abs().max())) for z in scores]
    counted = state.pop_kept()
    noise = [short(m.squares / m.draws / float(m.right.square().sum())) for m in means]
    along = [float(standard_errors(torch.stack(s), m)[0]) for s, m in zip(samples, means, strict=True)]
    seen = [short(LARGEST_Z * x / float(m.right.norm())) for x, m in zip(along, means, strict=True)]
    as_expected = all(0.5 < x < 1.5 or n < 1e-4 for x, n in zip(fall[str(call.case.seeds)], noise, strict=True))
    return {
        "check": "mean",
        "draws": call.case.seeds,
        "kept_fraction": round(counted.entries / counted.dense, 4) if counted.dense else None,
        "kept_per_row": round(counted.entries / counted.rows, 2) if counted.rows else None,
        "slow": {r: k for reasons in state.slow.values() for r, k in reasons.items()},
        "noise": noise,
        "z_along_gradient": [short(float(z[0])) for z in scores],
        "largest_z": worst,
        "bias_seen": seen,
        "error_over_expected": fall,
        "ok": max(worst) < LARGEST_Z and as_expected,
    }


def compare(session: Session, case: Case, sampler: str) -> Iterator[Row]:
    base = {"name": case.name, "sampler": sampler, "c": case.c_of(sampler), "shape": case.shape.key}
    call = Call(case, session.device)
    exact = call.exact()
    yield {**base, **at_infinity(call, exact, sampler)}
    yield {**base, **equal_seeds(call, sampler)}
    yield {**base, **mean_over_seeds(call, exact, call.library(), sampler)}


def replay(session: Session, sampler: str) -> Iterator[Row]:
    """A captured step draws anew in each replay, and its gradients are right in the mean."""
    case = Case("graph", Shape(1024, 64, 4, 2), 2, 64)
    call = Call(case, session.device)
    exact = call.exact()[1:]
    torch._dynamo.reset()
    backend = SUSBackend(c=case.c_of(sampler), sampler=sampler, compiler="eager", seed=3)
    function = torch.compile(
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), backend=backend
    )

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*call.qkv), call.qkv, call.grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    means = [Mean.of(e, error(x, e)) for e, x in zip(exact, call.library()[1:], strict=True)]
    samples: list[list[Tensor]] = [[] for _ in means]
    firsts = []
    for _ in range(case.seeds):
        graph.replay()
        firsts.append(captured[1].clone())
        for x, mean, kept in zip(captured, means, samples, strict=True):
            kept.append(mean.add(x))
    worst = [short(float(z_scores(torch.stack(s), m).abs().max())) for s, m in zip(samples, means, strict=True)]
    differ = not any(torch.equal(a, b) for a, b in pairwise(firsts))
    row = {"name": "graph", "sampler": sampler, "check": "replay", "rewritten": backend.report.rewritten}
    yield {**row, "draws_differ": differ, "largest_z": worst, "ok": differ and max(worst) < LARGEST_Z}


def reduce_overhead(session: Session, sampler: str) -> Iterator[Row]:
    """The same through torch.compile(mode="reduce-overhead"): equal to the plain compilation, draw by draw."""
    case = Case("reduce-overhead", Shape(1024, 64, 4, 2), 2, 6)
    call = Call(case, session.device)

    def steps(mode: str | None) -> list[Tensor]:
        torch._dynamo.reset()
        backend = SUSBackend(c=case.c_of(sampler), sampler=sampler, seed=3)
        function = torch.compile(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            backend=backend, mode=mode,
        )  # fmt: skip
        found = []
        for _ in range(case.seeds):
            torch.compiler.cudagraph_mark_step_begin()
            found.append(torch.autograd.grad(function(*call.qkv).float().square().sum(), call.qkv)[1].clone())
        return found

    plain, graphs = steps(None), steps("reduce-overhead")
    errors = [error(a, b.double()) for a, b in zip(graphs, plain, strict=True)]
    differ = not any(torch.equal(a, b) for a, b in pairwise(graphs))
    row = {"name": "reduce-overhead", "sampler": sampler, "check": "replay", "draws_differ": differ}
    yield {**row, "errors": [short(x) for x in errors], "ok": differ and max(errors) < 1e-2}


RACE = """
import torch
from fx_passes import sus_attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, h, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (2, 1, 1))
out = sus_attention(q, k, v, is_causal=True, enable_gqa=True, c=1.0, sampler={sampler!r}, seed=1)
torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
torch.cuda.synchronize()
"""


def races(session: Session, sampler: str, tool: str) -> Iterator[Row]:
    """compute-sanitizer on one tiny call; what it counts is in the row."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-c", RACE.format(sampler=sampler)]
    root, timeout = Path(__file__).parents[2], min(80.0, max(5.0, session.left() - 3))
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=timeout, check=False)
    lines = [x.strip("= ") for x in (done.stdout + done.stderr).splitlines() if "SUMMARY" in x or "rror" in x]
    row = {"name": f"compute-sanitizer {tool}", "sampler": sampler, "check": "races", "code": done.returncode}
    yield {**row, "says": lines[-3:], "ok": done.returncode == 0}


def run(session: Session) -> None:
    for case in cases(session):
        for sampler in samplers(session):
            key = f"{sampler} {case.name}"
            session.unit(key, lambda case=case, s=sampler: compare(session, case, s), 60)  # type: ignore[misc]
    extra: list[tuple[str, Callable[[str], Iterator[Row]], float]] = [
        ("replay", lambda s: replay(session, s), 60),
        ("reduce-overhead", lambda s: reduce_overhead(session, s), 90),
    ]
    if shutil.which("compute-sanitizer"):
        for tool in ("racecheck", "memcheck"):
            extra.append((tool, lambda s, tool=tool: races(session, s, tool), 90))  # type: ignore[misc]
    if session.device != "cuda":
        session.write({"key": "replay", "note": "not run: CUDA graphs and compute-sanitizer need a GPU"})
        return
    for name, check, limit in extra:
        for sampler in samplers(session)[:1] if name != "replay" else samplers(session):
            session.unit(f"{sampler} {name}", lambda check=check, s=sampler: check(s), limit)  # type: ignore[misc]
