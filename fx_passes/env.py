"""Prints what a bug report needs: ``python -m fx_passes.env``.

Versions, instruction set, compiler, native CPU kernel, Triton, GPUs, and the environment variables that matter. It
compiles nothing, loads no kernel, changes no file, and imports torch and Triton alone; of what is broken, it says so.
Where torch itself does not import, run the file: ``python path/to/fx_passes/env.py``.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "lightning", "pytorch-lightning", "torchmetrics", "transformers", "accelerate", "flash-attn", "xformers", "numpy",
)  # fmt: skip
# Others may hold secrets: of those that begin with SUS_, the names alone are printed.
VARIABLES = (
    "SUS_C", "SUS_SAMPLER", "SUS_SEED", "SUS_COMPILER", "SUS_FORWARD",
    "SUS_CACHE_DIR", "SUS_CACHE_GROUP", "SUS_CPU_ARCH", "SUS_CPU_EMULATED", "XDG_CACHE_HOME", "CXX",
    "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE",
)  # fmt: skip


def _package() -> str:
    """The version in the code, and that of the installed distribution where it is another."""
    here = Path(__file__).resolve().parent
    version, installed = runpy.run_path(str(here / "_version.py"))["__version__"], _version("sus-lightning")
    if installed != version:
        version += " (not installed)" if installed == "no" else f" (but installed: {installed})"
    return f"{version}, in {here}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "no"


def _system() -> str:
    return f"{platform.platform()}, {platform.machine()}, {os.cpu_count()} CPUs"


def _python() -> str:
    return f"{platform.python_version()} ({platform.python_implementation()})"


def _torch() -> str:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    hip = getattr(torch.version, "hip", None)
    return f"{torch.__version__}, built for {f'ROCm {hip}' if hip else build}, {torch.get_num_threads()} threads"


def _instructions() -> str:
    import torch

    from fx_passes.ops.cpu import build

    return f"{build.arch()}; torch uses {torch.backends.cpu.get_cpu_capability()}"


def _compiler() -> str:
    from fx_passes.ops.cpu import build

    command = build.find_compiler()
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30)
    if said.returncode:
        raise RuntimeError(f"{' '.join(command)} --version ended with status {said.returncode}")
    return f"{' '.join(command)}, {(said.stdout.splitlines() or ['says no version'])[0]}"


def _kernel() -> str:
    """Whether a library lies in the cache; whether it is whole is found out when it is loaded."""
    if os.name != "posix":
        return "none: it is for Linux and macOS"
    from fx_passes.ops.cpu import build, cache

    directory, name = cache.cache_directory(), build.name(build.arch())
    if directory is None:
        return f"{name}: compiled for each process, this user has no home directory (SUS_CACHE_DIR chooses a place)"
    if os.path.isfile(directory / name):
        refused = cache.refusal(directory, writing=False)
        return f"{name}: built, in {directory}" + (f", but not used as it is: {refused}" if refused else "")
    try:
        build.find_compiler()
    except build.BuildError:
        return f"{name}: not built, and no compiler: the slower PyTorch path runs"
    refused = cache.refusal(directory, writing=True)
    return f"{name}: " + (f"compiled for each process: {refused}" if refused else f"not built yet, in {directory}")


def _triton() -> str:
    version = _version("triton")
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "no"
        raise
    return version if sys.platform == "linux" else f"{version}, on {sys.platform}"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use"
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        able = "" if (p.major, p.minor) >= (8, 0) else ", too old for the Triton kernels (sm_80)"
        found.append(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB{able}")
    return "; ".join(found)


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0] if file.exists() else "no"


def _variables() -> str:
    known = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    others = sorted(name for name in os.environ if name.startswith("SUS_") and name not in VARIABLES)
    return "; ".join(known + [f"{name} is set, but nothing reads it" for name in others]) or "none"


LINES: dict[str, Callable[[], str]] = {
    "sus-lightning": _package,
    "Python": _python,
    "system": _system,
    "torch": _torch,
    **{name: partial(_version, name) for name in PACKAGES},
    "instruction set": _instructions,
    "C++ compiler": _compiler,
    "native kernel": _kernel,
    "Triton": _triton,
    "GPU": _gpus,
    "NVIDIA driver": _driver,
    "environment": _variables,
}


def _guarded(line: Callable[[], str]) -> str:
    try:
        return " ".join(line().split())
    except (Exception, SystemExit) as error:  # whatever is broken here is what the report is about
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def report() -> str:
    """The lines that ``python -m fx_passes.env`` prints. Never raises."""
    return "\n".join(f"{name + ':':<19}{_guarded(line)}" for name, line in LINES.items())


if __name__ == "__main__":
    if not __package__:  # run as a file: the package is beside it, and its folder must not stand for other modules
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    print(report())
