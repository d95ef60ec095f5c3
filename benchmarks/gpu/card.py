"""What the numbers are measured on: names, versions, the two ceilings, and which peers are there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fx_passes.ops.problem import SAMPLERS

from .calls import Shape, dense, gradients, inputs, median, milliseconds
from .rows import Row, Session, describe


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def output(*command: str) -> str | None:
    if not shutil.which(command[0]):
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False, timeout=20)
    return done.stdout.strip() or None


def about(session: Session) -> Iterator[Row]:
    row: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": output("git", "rev-parse", "HEAD"),
        "samplers": list(SAMPLERS),
    }
    if session.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "l2_mb": round(properties.L2_cache_size / 2**20),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "smi": output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv"),
        }
    else:
        row |= {"name": session.card, "capability": torch.backends.cpu.get_cpu_capability()}
        row["threads"] = torch.get_num_threads()
    yield row


def ceilings(session: Session) -> Iterator[Row]:
    """Bytes read and written per second by a copy, and bfloat16 matrix products on random data."""
    elements, side = (2**20, 256) if session.tiny else (2**30, 8192)
    source, target = (torch.randn(elements, device=session.device).bfloat16() for _ in range(2))
    ms = median(milliseconds(lambda: target.copy_(source), session.device, 3) for _ in range(6))
    yield {"what": "copy", "gb_per_s": round(2 * source.nbytes / ms / 1e6, 1)}
    a, b = (torch.randn(side, side, device=session.device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    ms = median(milliseconds(lambda: a @ b, session.device, 5) for _ in range(5))
    yield {"what": "bfloat16 product", "tflops": round(2 * side**3 / ms / 1e9, 2)}


def peers(session: Session) -> Iterator[Row]:
    """Which dense attentions run here at all (FlexAttention is tried where it is compiled), and which are packages."""
    shape = Shape(128, 64, 2, 2, dtype="bfloat16", kind="diffuse")
    tensors = inputs(shape, session.device)
    for name, make in dense(shape, session.device).items():
        if name == "flex":
            continue
        row: dict[str, Any] = {"peer": name, "runs": True}
        try:
            gradients(make(), tensors)
        except Exception as error:
            row |= {"runs": False, "note": describe(error)}
        yield row
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        package = module.partition(".")[0]
        found = importlib.util.find_spec(package) is not None and importlib.util.find_spec(module) is not None
        yield {"package": module, "found": found}


def run(session: Session) -> None:
    session.unit("about", lambda: about(session), 60)
    session.unit("peers", lambda: peers(session), 60)
    session.unit("ceilings", lambda: ceilings(session), 60)
