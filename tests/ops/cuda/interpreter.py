"""Triton's interpreter with its defects patched, and one check per patch that says whether it is still needed.

It also checks every address that a kernel loads from or stores to: it must lie in one of the launch's tensors.

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
_patch_lang_tensor = interpreter._patch_lang_tensor


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def _round_kernel(a_ptr, out_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, tl.load(a_ptr + i).to(tl.bfloat16))


@triton.jit
def _range_kernel(out_ptr, n):
    for i in range(0, n + tl.program_id(0)):
        tl.store(out_ptr + i, 1.0)


def range_is_wrong() -> bool:
    """A number known at run time is no bound of a range: an array of one element, which NumPy 2.4 makes no int of."""
    try:
        _range_kernel[(1,)](torch.empty(2), 2)
    except Exception:
        return True
    return False


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


def _tensor_with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _patch_range() -> None:
    interpreter._patch_lang_tensor = _tensor_with_index


def _patch_dot() -> None:
    _builder.create_dot = _dot


def _patch_rounding() -> None:
    _builder.cast_impl = _cast
    # These were bound to the class with `self.cast_impl` inside: they find the new one by themselves.


# Defects of the newest Triton, and those of older ones that are still supported.
PATCHES: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "dot": (dot_is_wrong, _patch_dot),
    "rounding": (rounding_is_wrong, _patch_rounding),
}
OLD_PATCHES: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "range": (range_is_wrong, _patch_range),  # before 3.9
}


_masked_load, _masked_store, _atomic = (
    _builder.create_masked_load,
    _builder.create_masked_store,
    _builder.create_atomic_rmw,
)
_launch = interpreter.GridExecutor.__call__
_begins, _ends = np.empty(0, np.uint64), np.empty(0, np.uint64)  # addresses of the running launch's tensors


def _launch_with_bounds(self: Any, *args: Any, **kwargs: Any) -> None:
    global _begins, _ends
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel()]
    spans = sorted(
        (
            x.data_ptr(),
            x.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.itemsize,
        )
        for x in tensors
    )
    _begins = np.array([begin for begin, _ in spans], np.uint64)
    _ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))
    _launch(self, *args, **kwargs)


def _check_addresses(pointers: Any, mask: Any) -> None:
    active = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))[mask.data]
    size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
    span = np.searchsorted(_begins, active, side="right") - 1
    outside = (span < 0) | (active + size > _ends[span])
    if outside.any():
        raise IndexError(f"{outside.sum()} of {outside.size} addresses lie in no tensor of the launch")


def _checked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
    _check_addresses(pointers, mask)
    return _masked_load(self, pointers, mask, *rest)


def _checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check_addresses(pointers, mask)
    return _masked_store(self, pointers, value, mask, *rest)


def _checked_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    _check_addresses(pointers, mask)
    return _atomic(self, operation, pointers, value, mask, *rest)


def _check_bounds() -> None:
    interpreter.GridExecutor.__call__ = _launch_with_bounds
    _builder.create_masked_load, _builder.create_masked_store = _checked_load, _checked_store
    _builder.create_atomic_rmw = _checked_atomic


@cache
def install() -> dict[str, bool]:
    """Applies the patches that this Triton needs, once; says for those of `PATCHES` which did."""
    needed = {}
    for name, (check, patch) in {**OLD_PATCHES, **PATCHES}.items():
        needed[name] = check()
        if needed[name]:
            patch()
    _check_bounds()
    return {name: needed[name] for name in PATCHES}
