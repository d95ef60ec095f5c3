"""The CUDA kernels without a GPU: interpreter and ahead-of-time compilation, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton")

from fx_passes.ops import tile_rule
from fx_passes.ops.cuda import library, support
from fx_passes.ops.cuda.lists import _SLACK, capacity_for, new_lists
from fx_passes.ops.problem import Problem, Static

ROOT = Path(__file__).parents[2]
# Bytes per block that a launch accepts: 99 KB on the smallest of the sm_8x, then 227 KB.
SHARED = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA"), 120: ("HMMA",)}
DOTS = {
    "systematic": ("attention_forward", "attention_columns"),
    "tile": ("tile_probe", "tile_dq", "tile_dkdv"),
}
ALL_DOTS = DOTS["systematic"] + DOTS["tile"]
EVERY = pytest.mark.parametrize("arch", [80, 90, 100, 120])
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in (100, 120)]
TILE = {"sampler": "tile"}


def _run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def _compile(arch: int, options: dict[str, Any], only: str = "") -> list[dict[str, Any]]:
    """Of the sampler "tile" its own kernels, unless `only` names others."""
    sampler = options.get("sampler", "systematic")
    only = only or ("tile" if sampler == "tile" else "")
    lines = _run("-m", "tests.ops.cuda.ahead", str(arch), json.dumps(options), only, TRITON_INTERPRET="0").splitlines()
    found = [json.loads(line) for line in lines]
    assert {r["kernel"] for r in found} >= {name for name in DOTS[sampler] if only in name}
    return found


def _check(found: list[dict[str, Any]], arch: int, stack: int = 0, dots: bool = True, small: bool = False) -> None:
    """`stack`: bytes that a thread may spill. `small`: some tiles are too small for more than mma.sync."""
    for r in found:
        name = r["kernel"]
        assert r["instructions"] > 50, f"{name} compiled to a trap"
        assert r["shared"] <= SHARED[arch], r
        assert r["tensor_memory"] <= 512, r
        assert r["stack"] <= (stack if name in ALL_DOTS else 16), r
        if dots and name in ALL_DOTS:
            assert sum(r["tensor_core"][i] for i in (*TENSOR_CORE[arch], *(["HMMA"] if small else []))) > 0, r
            if arch == 90 and not small:
                assert not r["tensor_core"]["HMMA"], f"{name} has mma.sync where wgmma is expected"


def test_importing_the_package_does_not_import_triton() -> None:
    _run("-c", "import sys, fx_passes.ops.dispatch; assert 'triton' not in sys.modules")


# The interpreter's tests that the default run leaves to `slow`, for its time.
_QUICK = "outdated or causal or late or low_precision or padding or bias or sinks or lost or split or lowered"
_INTERPRETER = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/cuda/check_kernels.py", "--timeout=1500")


def test_kernels_in_the_interpreter() -> None:
    _run(*_INTERPRETER, "-k", _QUICK)


def test_tile_kernels_in_the_interpreter() -> None:
    _run(*_INTERPRETER[:-2], "tests/ops/cuda/check_tile.py", "-k", "causal or low_precision or documents or popular")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_kernels_in_the_interpreter() -> None:
    _run(*_INTERPRETER, "tests/ops/cuda/check_tile.py", "tests/ops/cuda/check_offsets.py")


@pytest.mark.parametrize("arch", [80, 90, *SLOW])
def test_compiles_ahead_of_time(arch: int) -> None:
    _check(_compile(arch, {"d": 64}), arch, stack={80: 96, 90: 0, 100: 64, 120: 128}[arch])


@pytest.mark.parametrize("arch", [80, 90, *SLOW])
def test_compiles_tiles_ahead_of_time(arch: int) -> None:
    _check(_compile(arch, {"d": 128, **TILE}), arch, stack=192)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"d": 128, "groups": 1}, {"d": 80, "dtype": "float16"}, {"d": 64, **TILE}, {"d": 80, "groups": 1, **TILE}],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_compiles_head_sizes(arch: int, options: dict[str, Any]) -> None:
    _check(_compile(arch, options), arch, stack=192)


@EVERY
@pytest.mark.slow
def test_compiles_the_forward_that_draws_nothing(arch: int) -> None:
    """Of the sampler "tile" where the library has no forward, and of calls without a gradient."""
    lines = _run("-m", "tests.ops.cuda.ahead", str(arch), json.dumps({"d": 128, **TILE}), "attention_forward")
    _check([json.loads(line) for line in lines.splitlines()], arch, stack=192)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize("sampler", [{}, TILE], ids=["systematic", "tile"])
def test_compiles_the_largest_heads(arch: int, sampler: dict[str, Any]) -> None:
    _check(_compile(arch, {"d": 256, **sampler}), arch, stack=320, small=True)


# Features that act in different places are compiled together: each is in one kernel of every kind.
_TOGETHER = {
    "bands": ["causal", "window", "padding", "sinks", "dropout", "fixed"],
    "bias": ["bias", "mask", "prefix"],
    "caps": ["softcap", "ids", "library"],
}


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize("name", _TOGETHER)
@pytest.mark.parametrize("sampler", [{}, TILE], ids=["systematic", "tile"])
def test_compiles_every_feature(arch: int, name: str, sampler: dict[str, Any]) -> None:
    _check(_compile(arch, {"d": 64, "features": _TOGETHER[name], **sampler}), arch, stack=320)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [{}, TILE], ids=["systematic", "tile"])
def test_compiles_where_numbers_are_one(sampler: dict[str, Any]) -> None:
    """Triton makes a constant of an argument that is 1: n, every stride, and what is not in `scores.COUNTS`."""
    _check(_compile(90, {"d": 64, "c": 0.5, "n": 1, "heads": 1, "groups": 1, **sampler}), 90)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize(("d", "stack"), [(64, 0), (128, 0), (256, 480)])
def test_compiles_in_float32(arch: int, d: int, stack: int) -> None:
    _check(_compile(arch, {"d": d, "dtype": "float32"}), arch, stack=stack, dots=False)


@EVERY
@pytest.mark.slow
@pytest.mark.parametrize(("d", "stack"), [(64, 320), (128, 640)])
def test_compiles_tiles_in_float32(arch: int, d: int, stack: int) -> None:
    _check(_compile(arch, {"d": d, "dtype": "float32", **TILE}), arch, stack=stack, dots=False)


@pytest.mark.parametrize(("sampler", "c"), [("systematic", 30.0), ("tile", 30.0)])
def test_lengths_and_sites_share_their_kernels(sampler: str, c: float) -> None:
    """Two of each for all lengths, heads and sites: n is a multiple of 16 or not. `columns` has two forms.

    A third of those of "tile" for which a multiple of 64 needs no masked loads.
    """
    from tests.ops.cuda.ahead import record, variants

    launches = [
        launch
        for n in (1000, 1024, 3000, 8208, 20000)
        for heads, site in ((1, 0), (8, 1), (16, 4))
        for launch in record(n=n, heads=heads, groups=heads, sampler=sampler, c=c, site=site, features=("dropout",))
    ]
    most = {"attention_columns": 4, "tile_dq": 3, "tile_dkdv": 3}
    assert {name: k for name, k in variants(launches).items() if k > most.get(name, 2)} == {}


_TF32 = """
import torch
from fx_passes.ops.cuda.launch import shared_arguments
from fx_passes.ops.problem import Problem, Static
x = torch.empty(1, 1, 4, 16)
p = Problem(x, x, x, *[None] * 6, static=Static(scale=1.0))
print(shared_arguments(p, x)["PRECISION"])
{}
print(shared_arguments(p, x)["PRECISION"])
"""


@pytest.mark.parametrize("switch", ["cuda.matmul.allow_tf32 = True", "fp32_precision = 'tf32'"], ids=["old", "new"])
def test_tf32_is_used_where_it_is_allowed(switch: str) -> None:
    assert _run("-c", _TF32.format("torch.backends." + switch)).split() == ["ieee", "tf32"]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_the_librarys_output_has_the_operators_layout(backend: SDPBackend) -> None:
    q, k, v = (torch.randn(2, 3, 40, 16) for _ in range(3))
    with sdpa_kernel(backend):
        out = library.forward(Problem(q, k, v, *[None] * 6, static=Static(scale=0.25)))  # type: ignore[arg-type]
    assert out.transpose(1, 2).is_contiguous()


def test_lists_have_room_for_what_rounding_adds() -> None:
    """A row of one outlier and 65536 tiles of equal small masses: each addition to the total rounds the same way."""
    generator = torch.Generator().manual_seed(0)
    mass = (torch.rand(4000, generator=generator) + 1) * 2**-18
    total = torch.ones_like(mass)
    for _ in range(1 << 16):
        total += mass
    sums = (1 + 65536 * mass.double()) / total
    assert 1.003 < sums.max() < _SLACK


def _problem(sampler: str, n: int = 4096, d: int = 128, dtype: torch.dtype = torch.bfloat16) -> Problem:
    q, k, v = (torch.empty(1, 4, n, d, dtype=dtype, device="meta") for _ in range(3))
    return Problem(q, k, v, *[None] * 6, static=Static(scale=1.0, sampler=sampler))  # type: ignore[arg-type]


@pytest.mark.parametrize("n", [8192, 131072])
def test_bytes_kept_per_token_and_head(n: int) -> None:
    """What lies between forward and backward beside the output and 8 bytes of softmax."""
    p, capacity = _problem("systematic", n), capacity_for(30.0)
    assert capacity is not None
    assert new_lists(p, capacity).buffer.numel() / p.query.shape[:3].numel() <= 496 + 1


@pytest.mark.parametrize("features", [(), ("softcap",)])
def test_tiles_keep_the_logsumexp_alone(features: tuple[str, ...]) -> None:
    """Nothing beyond out and 4 bytes per row (8 where far-off logits want two numbers), and a code of constant size."""
    s = Static(scale=1.0, sampler="tile", softcap=30.0 if features else 0.0)
    q = torch.empty(2, 4, 4096, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    c, seed = torch.empty((), dtype=torch.float64, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    static = (s.scale, None, None, False, s.softcap, 0.0, s.sampler, "auto", True, 0, 0)
    out, maximum, total, kept = torch.ops.sus.attention(q, q, q, *[None] * 6, c, seed, seed, *static)
    assert maximum.nbytes + total.nbytes == (8 if features else 4) * q.shape[:3].numel()
    assert (out.nbytes, kept.numel()) == (q.nbytes, 1)


def test_room_for_every_tile_that_can_be_drawn() -> None:
    for c in (0.1, 1.0, 30.0, 1e30):
        for n in (64, 5000, 1 << 20):
            capacity = tile_rule.capacity_for(c, n)
            assert 1 <= capacity <= tile_rule.count(n, 64)
            assert tile_rule.c_limit(capacity, n) >= c
    assert tile_rule.capacity_for(30.0, 1 << 20) == 126


def test_dense_where_tiles_keep_most() -> None:
    def share(n: int, c: float, **band: int) -> float:
        return tile_rule.expected_share(c, n, n, band.get("left"), band.get("right"), 0)

    assert share(2048, 30.0, right=0) == 1.0
    assert (
        share(4096, 30.0, right=0) > tile_rule.LARGEST_SHARE > share(8192, 30.0, right=0) > share(32768, 30.0, right=0)
    )
    assert share(32768, 30.0, right=0, left=512) == 1.0  # a window of nine tiles
    assert share(32768, float("inf")) == 1.0


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (_problem("systematic"), None),
        (_problem("tile"), None),
        (_problem("tile", d=256, dtype=torch.float32), None),
        (_problem("independent"), "sampler 'independent'"),
        (_problem("systematic", d=264), "head sizes 264"),
        (_problem("systematic", dtype=torch.float64), "float64"),
        (_problem("systematic", n=(64 << 16) + 1), "4194305 keys"),
        (_problem("tile", n=(64 << 16) + 1), None),
    ],
    ids=lambda x: str(x) if not isinstance(x, Problem) else "",
)
def test_what_the_kernels_do_not_take(problem: Problem, reason: str | None) -> None:
    found = support.unsupported(problem)
    assert found == reason if reason is None else reason in (found or "")
