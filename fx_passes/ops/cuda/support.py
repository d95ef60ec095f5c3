"""Which calls the Triton kernels take. Needs no Triton: `fx_passes.ops.dispatch` asks before it imports the kernels."""

from __future__ import annotations

import torch

from fx_passes.ops.cuda.config import config
from fx_passes.ops.problem import Problem

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_SAMPLERS = ("systematic", "tile")
LARGEST_CAPACITY = 1024  # points per row of "systematic"; a larger c is served by the tiled path
_LARGEST_HEAD = 256
_LARGEST_INDEX = 1 << 31


def unsupported(problem: Problem) -> str | None:
    """Why the kernels do not take a call, or None if they do."""
    q, s = problem.query, problem.static
    if q.dtype not in _DTYPES:
        return f"dtype {q.dtype}"
    d, e = q.shape[-1], problem.value.shape[-1]
    if not (1 <= d <= _LARGEST_HEAD and 1 <= e <= _LARGEST_HEAD):
        return f"head sizes {d} and {e}: the kernels take 1 to {_LARGEST_HEAD}"
    if s.scale == 0:
        return "scale 0"
    if q.numel() == 0 or problem.key.numel() == 0:
        return "empty tensors"
    if s.sampler not in _SAMPLERS:
        return f"sampler {s.sampler!r}"
    if s.softcap and problem.attn_bias is not None:
        return "softcap together with a bias"
    if s.sampler == "systematic" and problem.key.shape[2] > config(q.dtype, d, e).sub << 16:
        return f"{problem.key.shape[2]} keys"
    if max(q.shape[:3].numel(), problem.key.shape[2]) >= _LARGEST_INDEX:
        return "more than 2^31 rows"
    return None


def available(device: torch.device) -> bool:
    """Whether Triton can be imported and the tensors' device, current or not, is new enough (sm_80)."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
