"""Forward, backward, both and peak memory of one attention call with SUS, beside the exact kernels that are installed.

    python benchmarks/attention_cuda.py --n 8192 32768 --heads 32 --d 128 --c 30 --json benchmarks/results/h100.json

It checks gradients first and prints no time if they are wrong. `--device cpu` runs the PyTorch path at toy size: it
proves that the script works and says nothing about a GPU. Every number that it prints was measured in that run.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))

from fx_passes.ops.functional import attend
from fx_passes.ops.reference import Dense, dense_attention
from fx_passes.state import State

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One kernel at one length: medians in milliseconds, memory above the inputs in bytes.

    `variance` is what SUS adds to the spread of the gradients over inputs, for dQ, dK and dV; see `variance`.
    """

    name: str
    n: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    both_ms: float | None = None
    peak_bytes: int | None = None
    variance: dict[str, float] | None = None
    note: str = ""


def sus(options: argparse.Namespace, c: float, seed: int = 1) -> Attention:
    """The operator as the compiler pass emits it: c and seed lie on the device, and a state tells the host c."""
    state = State(c)
    c_tensor = torch.tensor(c, dtype=torch.float64, device=options.device)
    seed_tensor = torch.tensor(seed, device=options.device)
    right = 0 if options.causal else None
    names = {"sampler": options.sampler, "forward": options.forward}
    return lambda q, k, v: attend(q, k, v, c_tensor, seed_tensor, right=right, state=state.id, **names)  # type: ignore[arg-type]


def library(options: argparse.Namespace, backend: SDPBackend) -> Attention:
    gqa = options.kv_heads != options.heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=options.causal, enable_gqa=gqa)

    return call


def flex(options: argparse.Namespace, n: int) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if options.causal:
        # Compiled, so that it makes no n x n tensor: at n = 131072 that has 17 GB.
        make = torch.compile(create_block_mask)
        mask = make(lambda b, h, i, j: i >= j, None, None, n, n, device=options.device)
    compiled = torch.compile(flex_attention)
    gqa = options.kv_heads != options.heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def flash_attn(options: argparse.Namespace) -> Attention:
    from flash_attn import flash_attn_func  # type: ignore[import-not-found]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=options.causal)
        return out.transpose(1, 2)

    return call


def sus_name(c: float) -> str:
    return f"sus c={c:g}"


def candidates(options: argparse.Namespace, n: int) -> dict[str, Callable[[], Attention]]:
    found: dict[str, Callable[[], Attention]] = {sus_name(c): lambda c=c: sus(options, c) for c in options.c}  # type: ignore[misc]
    on_gpu = options.device == "cuda"
    backends = ["FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"] if on_gpu else ["FLASH_ATTENTION"]
    if n <= 4096:
        backends.append("MATH")
    for name in backends:
        found[f"sdpa {name.lower()}"] = lambda name=name: library(options, getattr(SDPBackend, name))  # type: ignore[misc]
    if on_gpu:
        found["flex_attention"] = lambda: flex(options, n)
        found["flash-attn"] = lambda: flash_attn(options)
    return found


def inputs(options: argparse.Namespace, n: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and dO. Random, so attention is diffuse and every row keeps c entries: the worst case for SUS."""
    generator = torch.Generator(options.device).manual_seed(seed)
    heads = (options.heads, options.kv_heads, options.kv_heads, options.heads)
    dtype = getattr(torch, options.dtype)
    made = [
        torch.randn(options.batch, h, n, options.d, generator=generator, device=options.device).to(dtype) for h in heads
    ]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def milliseconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    """Median over the repeats after as many calls to warm up; by CUDA events on a GPU."""
    for _ in range(options.warmup):
        call()
    times = []
    for _ in range(options.repeats):
        if options.device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(name: str, make: Callable[[], Attention], options: argparse.Namespace, n: int) -> Row:
    row = Row(name, n)
    try:
        attention = make()
        q, k, v, grad = inputs(options, n)

        def both() -> None:
            torch.autograd.grad(attention(q, k, v), (q, k, v), grad)

        both()
        if options.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            both()
            row.peak_bytes = torch.cuda.max_memory_allocated() - before
        row.forward_ms = milliseconds(lambda: attention(q, k, v), options)
        out = attention(q, k, v)
        row.backward_ms = milliseconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), options)
        row.both_ms = milliseconds(both, options)
    except Exception as error:  # a kernel that does not take this call, or is not installed, is a line that says so
        row.note = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return row


def gradients(attention: Attention, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    q, k, v, grad = tensors
    return torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def square(x: Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def check(options: argparse.Namespace) -> list[str]:
    """What is wrong with the gradients at a small length, against float64: of c = inf, and of the mean over seeds."""
    tensors = inputs(options, min(256, *options.n), seed=1)
    q, k, v, grad = tensors
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = dense_attention(Dense(*wide, right=0 if options.causal else None))
    exact = torch.autograd.grad(out, wide, grad.double())
    tolerance = 1e-4 if q.dtype == torch.float32 else 3e-2
    wrong = []
    for name, found, right in zip("qkv", gradients(sus(options, float("inf")), tensors), exact, strict=True):
        if (found - right).norm() > tolerance * right.norm():
            wrong.append(f"d{name} at c = inf is off by {float((found - right).norm() / right.norm()):.2e}")
    seeds = 64
    base = [g.double() for g in gradients(sus(options, float("inf")), tensors)]
    draws = [gradients(sus(options, options.c[0], seed), tensors) for seed in range(seeds)]
    for i, name in enumerate("qkv"):
        errors = torch.stack([d[i] - base[i] for d in draws])
        noise = (errors.square().flatten(1).sum(1).mean() / seeds).sqrt()
        if errors.mean(0).norm() > 1.5 * noise + tolerance * base[i].norm():
            wrong.append(f"d{name} has a bias: mean error {float(errors.mean(0).norm()):.2e}, noise {float(noise):.2e}")
    return wrong


def variance(options: argparse.Namespace, n: int, c: float) -> dict[str, float]:
    """E|g_sus - g|^2 / Var(g) over inputs drawn anew, for q, k and v: what SUS adds to the spread of a batch."""
    added, squares = [0.0] * 3, [0.0] * 3
    sums = [torch.zeros((), device=options.device)] * 3
    for seed in range(options.samples):
        tensors = inputs(options, n, seed=100 + seed)
        right = gradients(sus(options, float("inf")), tensors)
        found = gradients(sus(options, c, seed), tensors)
        for i, (f, r) in enumerate(zip(found, right, strict=True)):
            added[i] += square(f.float() - r.float()) / options.samples
            squares[i] += square(r.float())
            sums[i] = sums[i] + r.float()
    # Sums instead of all samples: at the longest n these would not fit.
    spread = [(x - square(s) / options.samples) / (options.samples - 1) for x, s in zip(squares, sums, strict=True)]
    return {f"d{name}": a / s for name, a, s in zip("qkv", added, spread, strict=True)}


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What the numbers were measured on."""
    commit = None
    if shutil.which("git"):
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = done.stdout.strip() or None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({platform.machine()})",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
    }


def show(row: Row) -> str:
    if row.note:
        return f"{row.name:26} {row.n:>8} {row.note}"
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
    times = "".join(f" {ms:10.3f}" for ms in (row.forward_ms, row.backward_ms, row.both_ms))
    spread = "" if row.variance is None else " ".join(f"{x:8.2e}" for x in row.variance.values())
    return f"{row.name:26} {row.n:>8}{times} {peak:>10}  {spread}".rstrip()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--n", type=int, nargs="+", help="lengths; by default 8192 32768 131072, on a CPU 256")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--d", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--c", type=float, nargs="+", default=[30.0])
    parser.add_argument("--sampler", default="systematic")
    parser.add_argument("--forward", default="auto", choices=("auto", "library"))
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4, help="inputs drawn for the variance")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    options.n = options.n or ([8192, 32768, 131072] if gpu else [256])
    options.heads = options.heads or (32 if gpu else 2)
    options.kv_heads = options.kv_heads or options.heads
    options.d = options.d or (128 if gpu else 32)
    options.dtype = options.dtype or ("bfloat16" if gpu else "float32")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    what = about(options)
    print(f"{what['device']}, torch {what['torch']}, triton {what['triton']}, commit {what['commit']}")
    if options.device == "cpu":
        print("toy run of the PyTorch path: it shows that this script works, not how fast a GPU is")
    wrong = check(options)
    if wrong:
        print("gradients are wrong, nothing is timed:", *wrong, sep="\n  ")
        return 1
    print(f"gradients agree with float64; c = {', '.join(f'{c:g}' for c in options.c)}, {options.sampler}")
    print("variance: what SUS adds to the spread of dQ, dK, dV over inputs, for the same c and inputs as the times")
    print(f"{'':26} {'n':>8} {'forward':>10} {'backward':>10} {'both (ms)':>10} {'peak (MB)':>10}  variance")
    rows = []
    for n in options.n:
        spread = {sus_name(c): variance(options, n, c) for c in options.c}
        for name, make in candidates(options, n).items():
            rows.append(measure(name, make, options, n))
            rows[-1].variance = spread.get(name)
            print(show(rows[-1]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**what, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
