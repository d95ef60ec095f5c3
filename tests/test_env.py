"""`python -m fx_passes.env`: what a bug report needs, whatever is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fx_passes import __version__, env
from fx_passes.ops.cpu import build, cache

ROOT = Path(__file__).parents[1]
FILE = ROOT / "fx_passes" / "env.py"


def lines(*command: str, **environment: str | None) -> dict[str, str]:
    changed = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    variables = {name: value for name, value in changed.items() if value is not None}
    done = subprocess.run(
        [sys.executable, *(command or ("-m", "fx_passes.env"))],
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert list(found) == list(env.LINES)
    return {name: value.strip() for name, value in found.items()}


def test_what_is_here() -> None:
    found = dict(line.split(":", 1) for line in env.report().splitlines())
    assert f" {__version__}" in found["sus-lightning"]
    assert found["torch"].strip().startswith(torch.__version__)
    assert found["instruction set"].strip().startswith(build.arch() + ";")
    assert build.name(build.arch()) in found["native kernel"]
    assert not [line for line in found.values() if line.strip().startswith("failed")]


def test_without_compiler_home_or_kernel(tmp_path: Path) -> None:
    bare = {"CXX": "no-such-compiler", "HOME": None, "XDG_CACHE_HOME": None, "SUS_CACHE_DIR": str(tmp_path / "none")}
    found = lines(**bare, SUS_TOKEN="s3cret", HF_TOKEN="s3cret", SUS_C="64")
    assert "no-such-compiler not found" in found["C++ compiler"]
    assert found["native kernel"].endswith("not built, and no compiler: the slower PyTorch path runs")
    assert not (tmp_path / "none").exists()
    assert "SUS_C=64" in found["environment"]
    assert "SUS_TOKEN is set" in found["environment"]
    assert not [line for line in found.values() if "s3cret" in line]


def test_what_is_broken_is_said(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    found = lines(PYTHONPATH=f"{ROOT}:{tmp_path}", CXX="false", SUS_CACHE_DIR=str(tmp_path / "open"))
    assert found["C++ compiler"].endswith("false --version ended with status 1")
    assert found["native kernel"].endswith(
        f"compiled for each process: others can write to {tmp_path / 'open'} (mode 0777)"
    )
    assert found["Triton"] == "failed: ImportError: libtriton.so: undefined symbol"
    assert not list((tmp_path / "open").iterdir())


def test_a_cache_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(place: Path) -> str:
        monkeypatch.setenv("SUS_CACHE_DIR", str(place))
        return env._kernel().split(": ", 1)[1]

    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    assert kernel(tmp_path / "new" / "er") == f"not built yet, in {tmp_path / 'new' / 'er'}"
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_bytes(b"")
    assert kernel(tmp_path / "file") == f"compiled for each process: {tmp_path / 'file'} is no directory"
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    assert "others can write to" in kernel(tmp_path / "shared" / "below")
    (tmp_path / "shared" / build.name(build.arch())).write_bytes(b"")
    assert f"built, in {tmp_path / 'shared'}, but not used as it is: others" in kernel(tmp_path / "shared")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert kernel(tmp_path / "new") == f"compiled for each process: this user cannot write to {tmp_path}"
    monkeypatch.setenv("SUS_CACHE_GROUP", "no-such-group")
    with pytest.raises(ValueError, match="SUS_CACHE_GROUP must be a group of this machine"):
        kernel(tmp_path / "new")


def test_a_bad_variable_is_one_line() -> None:
    found = lines(SUS_CPU_ARCH="sparc")
    assert found["instruction set"].startswith("failed: ValueError: SUS_CPU_ARCH must be one of")
    assert found["Python"]


def test_as_a_file_where_torch_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: broken')")
    found = lines(str(FILE), PYTHONPATH=str(tmp_path))
    assert found["torch"] == "failed: ImportError: libtorch.so: broken"
    assert found["sus-lightning"].startswith(__version__)


def test_built_is_said_of_a_kernel_that_lies_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUS_CACHE_DIR", str(tmp_path))
    assert "not built yet" in env.report()
    (tmp_path / build.name(build.arch())).write_bytes(b"")
    assert f": built, in {cache.cache_directory()}" in env.report()
    assert torch.__version__ in env.report()


def test_all_variables_that_the_code_reads_are_printed() -> None:
    sources = [p.read_text() for folder in ("fx_passes", "sus_lightning") for p in (ROOT / folder).rglob("*.py")]
    read = {name for text in sources for name in re.findall(r"\"(SUS_[A-Z]+(?:_[A-Z]+)*)\"", text)}
    assert read - {"SUS_"} <= set(env.VARIABLES)
