"""Building and loading of the native CPU kernel, and what happens where that fails. Its cache: test_cpu_cache.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fx_passes import sus_attention
from fx_passes.ops.cpu import bind, build, cache

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


def start(program: str = USE, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def result(process: subprocess.Popen[str]) -> tuple[float, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return float(out), err


@pytest.fixture(scope="module")
def usual_norm() -> float:
    """What the program prints with the kernel that this machine chooses."""
    return result(start())[0]


@needs_compiler
@pytest.mark.parametrize("arch", [arch for arch in ARCHES if arch != build.arch()])
def test_every_instruction_set_gives_the_same(arch: str, tmp_path: Path, usual_norm: float) -> None:
    environment = {"SUS_CPU_ARCH": arch}
    if ARCHES.index(arch) > ARCHES.index(build.arch()):
        if arch != "avx512" or build.arch() != "avx2":
            pytest.skip("this machine does not have it")
        environment |= {
            "CXX": str(EMULATED_AVX512), "SUS_CPU_EMULATED": "avx512", "SUS_CACHE_DIR": str(tmp_path / "cache")
        }  # fmt: skip
    norm, err = result(start(**environment))
    assert "PyTorch path" not in err
    assert norm == pytest.approx(usual_norm, rel=0.02)


def test_without_a_compiler_one_warning(tmp_path: Path, usual_norm: float) -> None:
    norm, err = result(start(CXX="no-such-compiler", SUS_CACHE_DIR=str(tmp_path / "cache")))
    assert err.count("no native CPU kernel") == 1
    assert "no-such-compiler not found" in err
    assert norm == pytest.approx(usual_norm, rel=0.02)  # the same draws


def compiler(tmp_path: Path, script: str) -> str:
    """Path of a compiler that is a shell script."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo this compiler is broken >&2; exit 1", "this compiler is broken"),
        ("echo no space in here >&2", "wrote no library:\nno space in here"),
        ('for target; do :; done; echo no library > "$target"', "does not load"),
        ('for target; do :; done; exec g++ -shared -x c++ /dev/null -o "$target"', "undefined symbol: sus_forward"),
        ("kill -9 $$", "failed"),
    ],
)
def test_a_compiler_that_fails(tmp_path: Path, script: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, script))
    monkeypatch.setenv("SUS_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(build.BuildError, match=re.escape(message)):
        cache.load(build.arch())
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("cxx", ["-pipe", "   -g0 '-DNAME=\"a b\"'"])
def test_compilers_with_arguments(tmp_path: Path, cxx: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'echo "$1" "$2" > {tmp_path}/arguments; for target; do :; done; echo > "$target"'
    monkeypatch.setenv("CXX", f"{compiler(tmp_path, script)} {cxx}")
    assert build.compile_library("plain", str(tmp_path)) == b"\n"
    assert (tmp_path / "arguments").read_text().startswith(cxx.replace("'", "").strip())


@needs_compiler
def test_a_real_compiler_with_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ -pipe")
    assert build.compile_library("plain", str(tmp_path)).startswith(b"\x7fELF")


def test_a_compiler_that_is_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++ 'unbalanced")
    with pytest.raises(build.BuildError, match=r"CXX is .*unbalanced.*No closing quotation"):
        build.find_compiler()


def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUS_CPU_ARCH", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        build.arch()


def test_an_instruction_set_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose processor lists nothing but what plain code needs."""
    read = Path.read_text

    def read_text(path: Path, *args: str) -> str:
        return "flags : fpu sse2 avx2 fma\n" if str(path) == "/proc/cpuinfo" else read(path, *args)

    monkeypatch.setattr(Path, "read_text", read_text)
    for wanted, lacks in (("avx512", "avx512f, avx512dq"), ("avx2", "f16c")):
        monkeypatch.setenv("SUS_CPU_ARCH", wanted)
        with pytest.raises(ValueError, match=f"{wanted}.*this machine has no {lacks}.*it can run: plain"):
            build.arch()
    monkeypatch.delenv("SUS_CPU_ARCH")
    assert build.arch() == "plain"  # whatever PyTorch says


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
