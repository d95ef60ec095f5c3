"""Triton's interpreter with its defects patched, and one check per patch that says whether it is still needed.

Import it before anything that imports Triton, in a process of its own: TRITON_INTERPRET=1 counts from the start.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_create_dot, _cast_impl = _builder.create_dot, _builder.cast_impl


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _round_kernel(a_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.load(a_ptr + i).to(tl.bfloat16))


def dot_is_wrong() -> bool:
    """bfloat16 operands of a dot are multiplied as the unsigned integers that hold their bits."""
    a = torch.eye(16, dtype=torch.bfloat16)
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, a, out)
    return not torch.equal(out, torch.eye(16))


def rounding_is_wrong() -> bool:
    """float32 to bfloat16 cuts off instead of rounding."""
    a = torch.full((16,), 1.0 + 2**-8 + 2**-9)
    out = torch.empty(16, dtype=torch.bfloat16)
    _round_kernel[(1,)](a, out)
    return not torch.equal(out, a.bfloat16())


def _to_float(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
    return _create_dot(self, _to_float(a), _to_float(b), d, *rest)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nan = np.isnan(src.data)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(nan, np.uint16(0x7FC0), rounded), dst_type.scalar)
    return _cast_impl(self, src, dst_type)


def _patch_dot() -> None:
    _builder.create_dot = _dot


def _patch_rounding() -> None:
    _builder.cast_impl = _cast
    # These were bound to the class with `self.cast_impl` inside: they find the new one by themselves.


PATCHES: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "dot": (dot_is_wrong, _patch_dot),
    "rounding": (rounding_is_wrong, _patch_rounding),
}


@cache
def install() -> dict[str, bool]:
    """Applies the patches that this Triton needs, once; says which did."""
    needed = {name: check() for name, (check, _) in PATCHES.items()}
    for name, (_, patch) in PATCHES.items():
        if needed[name]:
            patch()
    return needed
