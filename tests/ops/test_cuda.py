"""The CUDA kernels without a GPU: interpreter and ahead-of-time compilation, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Bytes per block that a launch accepts: 163 KB, 227 KB and 227 KB.
SHARED = {80: 166912, 90: 232448, 100: 232448}
TENSOR_CORE = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA", "UTCQMMA", "HMMA")}


def _run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def _compile(arch: int, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = _run("-m", "tests.ops.cuda.ahead", str(arch), json.dumps(options), TRITON_INTERPRET="0").splitlines()
    return {r["kernel"]: r for r in map(json.loads, lines)}


def _check(found: dict[str, dict[str, Any]], arch: int, stack: int = 0, dots: bool = True) -> None:
    for name, r in found.items():
        assert r["instructions"] > 50, f"{name} compiled to a trap"
        assert r["shared"] <= SHARED[arch], r
        assert r["tensor_memory"] <= 512, r
        assert r["stack"] <= stack, r
        if dots and name in ("attention_forward", "attention_columns"):
            assert sum(r["tensor_core"][i] for i in TENSOR_CORE[arch]) > 0, r
        if arch == 90:
            assert not r["tensor_core"]["HMMA"], f"{name} has mma.sync where wgmma is expected"


def test_importing_the_package_does_not_import_triton() -> None:
    _run("-c", "import sys, fx_passes.ops.dispatch; assert 'triton' not in sys.modules")


# The interpreter's tests that the default run leaves to `slow`, for its time.
_QUICK = "outdated or causal or low_precision or padding or bias_and_its_gradient or sinks or lost or split or lowered"


def test_kernels_in_the_interpreter() -> None:
    _run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/cuda/check_kernels.py", "-k", _QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_kernels_in_the_interpreter() -> None:
    _run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/ops/cuda/check_kernels.py", "--timeout=1500")


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_ahead_of_time(arch: int) -> None:
    _check(_compile(arch, {"d": 64}), arch, stack={80: 96, 90: 0, 100: 64}[arch])


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    "options",
    [
        {"d": 128},
        {"d": 128, "groups": 1, "dtype": "float16"},
        {"d": 80},
        *({"d": 64, "features": ["causal", name]} for name in ("window", "padding", "softcap", "sinks", "dropout")),
        *({"d": 64, "features": [name]} for name in ("bias", "mask", "ids", "prefix", "library")),
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_compiles_every_feature(arch: int, options: dict[str, Any]) -> None:
    _check(_compile(arch, options), arch, stack=160 if arch > 80 else 700)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_compiles_in_float32(arch: int, d: int) -> None:
    _check(_compile(arch, {"d": d, "dtype": "float32"}), arch, stack=0 if d <= 64 else 1000, dots=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_the_largest_heads(arch: int) -> None:
    found = _compile(arch, {"d": 256})
    for r in found.values():
        r["tensor_core"]["HMMA"] *= arch != 90  # sub-tiles of 32 keys are too small for wgmma in dK and dV
    _check(found, arch, stack=1000)
