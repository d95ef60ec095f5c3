"""Compiles the native kernel.

The library has a plain C interface and includes no torch header, so that it compiles in seconds. It is built for the
instruction set that this machine has. Where it is kept, and what may be loaded, is in `cache`.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=default", "-w")
# Threads by OpenMP: the library then shares the runtime and the thread pool that torch has loaded.
_THREADS = ("-fopenmp",)
_ARCHES = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "plain": (),
}
_TIMEOUT = 300  # seconds, of one run of the compiler


class BuildError(RuntimeError):
    """There is no native kernel on this machine; the message says why."""


def arch() -> str:
    """The instruction set to use: "avx512", "avx2" or "plain". SUS_CPU_ARCH overrides what PyTorch found.

    Raises:
        ValueError: SUS_CPU_ARCH is none of them, or the machine lacks its instructions.
    """
    wanted = os.environ.get("SUS_CPU_ARCH")
    if not wanted:
        found = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "plain")
        return next(name for name in list(_ARCHES)[list(_ARCHES).index(found) :] if not _missing(name))
    if wanted not in _ARCHES:
        raise ValueError(f"SUS_CPU_ARCH must be one of {', '.join(_ARCHES)}, but it is {wanted!r}")
    # The tests compile AVX-512 for machines without it.
    missing = [] if os.environ.get("SUS_CPU_EMULATED") == wanted else _missing(wanted)
    if missing:
        able = ", ".join(name for name in _ARCHES if not _missing(name))
        raise ValueError(
            f"SUS_CPU_ARCH is {wanted!r}, but this machine has no {', '.join(missing)}; it can run: {able}"
        )
    return wanted


def _missing(arch: str) -> list[str]:
    """Instructions of an instruction set that the machine lacks."""
    needed = [flag.removeprefix("-m") for flag in _ARCHES[arch] if not flag.startswith("-mprefer")]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        has = set(next(line for line in lines if line.startswith("flags")).split(":")[1].split())
    except (OSError, StopIteration, UnicodeDecodeError):
        known = {"avx512": "AVX512", "avx2": "AVX2"}
        able = {"AVX512": ["avx512", "avx2"], "AVX2": ["avx2"]}.get(torch.backends.cpu.get_cpu_capability(), [])
        return [] if arch == "plain" or arch in able else [known[arch]]
    return [name for name in needed if name not in has]


def name(arch: str) -> str:
    """File name of the library for an instruction set: by all that decides what it must contain.

    The compiler is not among that: a library that is there serves a machine that has none.
    """
    digest = hashlib.sha256("\0".join((sys.platform, platform.machine(), *_FLAGS, *_ARCHES[arch])).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h", ".inc"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"sus_cpu_{arch}_{digest.hexdigest()[:16]}.so"


def find_compiler() -> list[str]:
    """Command of a C++ compiler: what CXX says, arguments included, else the first of the usual names."""
    wanted = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(wanted)] if wanted else [["g++"], ["c++"], ["clang++"]]
    except ValueError as error:
        raise BuildError(f"CXX is {wanted!r}, which is no command: {error}") from error
    for command in commands:
        path = shutil.which(command[0])
        if path:
            return [path, *command[1:]]
    raise BuildError(f"no C++ compiler: {wanted or 'g++, c++, clang++'} not found (CXX chooses another)")


def compile_library(arch: str, directory: str) -> bytes:
    """The contents of a library for an instruction set; the compiler works in a private directory."""
    target = os.path.join(directory, "sus.so")
    command = [*find_compiler(), *_FLAGS, *_ARCHES[arch], *_THREADS, str(SOURCES / "sus.cpp"), "-o", target]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
            env={**os.environ, "TMPDIR": directory},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler did not run: {error}") from error
    said = (result.stderr + result.stdout).strip()[-2000:]
    if result.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{said}")
    try:
        contents = Path(target).read_bytes()
    except OSError:
        contents = b""
    if not contents:
        raise BuildError(f"{shlex.join(command)} ended without an error, but wrote no library:\n{said}")
    return contents
