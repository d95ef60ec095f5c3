"""Compiles the native kernel on first use and keeps the result in the user's cache.

The library has a plain C interface and includes no torch header, so that it compiles in seconds. It is built for the
instruction set that this machine has: a home directory shared by several machines holds one library for each.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "src"
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=default", "-w")
_ARCHES = {
    "avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "plain": (),
}
_TIMEOUT = 300  # seconds, of one run of the compiler


class BuildError(RuntimeError):
    """There is no native kernel on this machine; the message says why."""


def arch() -> str:
    """The instruction set to use: "avx512", "avx2" or "plain". SUS_CPU_ARCH overrides what PyTorch found."""
    wanted = os.environ.get("SUS_CPU_ARCH")
    if wanted:
        if wanted not in _ARCHES:
            raise ValueError(f"SUS_CPU_ARCH must be one of {', '.join(_ARCHES)}, but it is {wanted!r}")
        return wanted
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "plain")


def cache_directory() -> Path:
    """SUS_CACHE_DIR, or the place for this user's caches."""
    chosen = os.environ.get("SUS_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sus-lightning"


def find_compiler() -> str:
    """Path of a C++ compiler: what CXX names, else the first of the usual names."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++", "clang++"):
        path = shutil.which(name)
        if path:
            return path
    raise BuildError(f"no C++ compiler: {wanted or 'g++, c++, clang++'} not found (CXX chooses another)")


@functools.cache
def library_path(arch: str) -> Path:
    """The shared library for an instruction set, compiled if the cache does not hold it.

    Several processes may build at once: each writes a file of its own and renames it to the final name, which is one
    step for the file system.
    """
    compiler = find_compiler()
    flags = (*_FLAGS, *_ARCHES[arch])
    target = cache_directory() / f"sus_cpu_{arch}_{_fingerprint(compiler, flags)}.so"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=target.stem, suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent}: {error} (SUS_CACHE_DIR chooses another place)") from error
    os.close(handle)
    try:
        # Threads by OpenMP: the library then shares the runtime and the thread pool that torch has loaded.
        _compile([compiler, *flags, "-fopenmp", str(SOURCES / "sus.cpp"), "-o", temporary])
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


def _compile(command: list[str]) -> None:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler did not run: {error}") from error
    if result.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    """Hash of everything that decides what the library contains."""
    command = [compiler, "--version"]
    try:
        version = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler did not run: {error}") from error
    digest = hashlib.sha256("\0".join((version, *flags)).encode())
    for source in sorted(SOURCES.iterdir()):
        if source.suffix in (".cpp", ".h", ".inc"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]
