"""Building, caching and loading of the native CPU kernel, and what happens where that fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fx_passes import sus_attention
from fx_passes.ops.cpu import bind, build

needs_compiler = pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")

ARCHES = ("plain", "avx2", "avx512")  # each has what those before it have
EMULATED_AVX512 = Path(__file__).parent / "native/compile-avx512"

USE = """
import torch
from fx_passes import sus_attention
torch.manual_seed(0)
q, k, v = (torch.randn(1, 2, 300, 32, requires_grad=True) for _ in range(3))
sus_attention(q, k, v, is_causal=True, c=8, seed=1).square().sum().backward()
print(float(q.grad.norm()))
"""


def start(**environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", USE]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process: subprocess.Popen[str]) -> tuple[float, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return float(out), err


@needs_compiler
def test_processes_that_build_at_once(tmp_path: Path) -> None:
    found = [result(p) for p in [start(SUS_CACHE_DIR=str(tmp_path)) for _ in range(3)]]
    assert len({norm for norm, _ in found}) == 1
    assert not any("PyTorch path" in err for _, err in found)
    assert len(list(tmp_path.iterdir())) == 1  # one library, no left-overs


@needs_compiler
@pytest.mark.parametrize("arch", ARCHES)
def test_every_instruction_set_gives_the_same(arch: str) -> None:
    environment = {"SUS_CPU_ARCH": arch}
    if ARCHES.index(arch) > ARCHES.index(build.arch()):
        if arch != "avx512" or build.arch() != "avx2":
            pytest.skip("this machine does not have it")
        environment["CXX"] = str(EMULATED_AVX512)
    norm, err = result(start(**environment))
    assert "PyTorch path" not in err
    assert norm == pytest.approx(result(start())[0], rel=0.02)


def test_without_a_compiler_one_warning(tmp_path: Path) -> None:
    norm, err = result(start(CXX="no-such-compiler", SUS_CACHE_DIR=str(tmp_path)))
    assert err.count("no native CPU kernel") == 1
    assert "no-such-compiler not found" in err
    assert norm == pytest.approx(result(start())[0], rel=0.02)  # the same draws


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    _, err = result(start(CXX=str(compiler), SUS_CACHE_DIR=str(tmp_path / "cache")))
    assert "this compiler is broken" in err
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _, err = result(start(SUS_CACHE_DIR=str(tmp_path / "file" / "below")))
    if bind.library() is not None:
        assert "cannot write" in err
        assert "SUS_CACHE_DIR" in err


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUS_CPU_ARCH", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        build.arch()


def _work() -> list[float]:
    q, k, v = (torch.randn(1, 2, 400, 32, generator=torch.Generator().manual_seed(1)) for _ in range(3))
    q.requires_grad_()
    sus_attention(q, k, v, is_causal=True, c=8, seed=1).sum().backward()
    return [float(q.grad.norm())]


class Samples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(_work())


@needs_compiler
def test_in_forked_workers_after_use_in_the_parent() -> None:
    expected = _work()
    loader = torch.utils.data.DataLoader(Samples(), num_workers=2, multiprocessing_context="fork", timeout=60)
    for x in loader:
        assert x.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@needs_compiler
def test_in_a_bare_fork() -> None:
    """The child has PyTorch's number of threads and no thread of the OpenMP pool."""
    _work()
    child = os.fork()
    if child == 0:
        q = torch.ones(1, 2, 400, 32)
        sus_attention(q, q, q, is_causal=True, c=8, seed=1)
        os._exit(0)
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")
