"""ctypes structs and calls of the native kernel: src/api.h in Python."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from ctypes import POINTER, Structure, byref, c_double, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from typing import Any, TypeVar

import torch
from torch import Tensor

from fx_passes.ops.cpu.build import BuildError, arch
from fx_passes.ops.draws import STREAM_DROPOUT, STREAM_ROW, stream_word
from fx_passes.ops.problem import Problem

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANES = 16  # of src/simd.h
_NO_BOUND = 1 << 60
S = TypeVar("S", bound=Structure)


class _Strides(Structure):
    _fields_ = (("batch", c_int64), ("head", c_int64), ("row", c_int64))


class _Places(Structure):
    _fields_ = tuple((name, c_int64) for name in ("batch", "head", "row", "key"))


class _Call(Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value")),
        *((name, _Strides) for name in ("query_strides", "key_strides", "value_strides")),
        ("mask", c_void_p),
        *((name, c_int64) for name in ("mask_batch", "mask_key")),
        ("places", c_void_p),
        ("places_strides", _Places),
        ("bias", c_void_p),
        ("bias_strides", _Places),
        *((name, c_void_p) for name in ("query_ids", "key_ids")),
        *((name, c_int64) for name in ("query_ids_batch", "key_ids_batch")),
        ("prefix", c_void_p),
        ("prefix_batch", c_int64),
        ("sinks", c_void_p),
        *((name, c_int64) for name in ("batch", "heads", "groups", "m", "n", "dk", "dv")),
        *((name, c_int64) for name in ("key_width", "value_width", "left", "right")),
        ("scale", c_float),
        *((name, c_int32) for name in ("dtype", "threads", "ids_ascend")),
        *((name, c_float) for name in ("softcap", "dropout_factor")),
    )


class _Forward(Structure):
    _fields_ = (
        ("call", _Call),
        ("c", c_double),
        *((name, c_uint64) for name in ("seed", "dropout_seed")),
        *((name, c_uint32) for name in ("stream", "dropout_stream", "drop_below")),
        ("out", c_void_p),
        ("out_strides", _Strides),
        *((name, c_void_p) for name in ("maximum", "total")),
    )


class _Backward(Structure):
    _fields_ = (
        ("call", _Call),
        *((name, c_void_p) for name in ("grad", "out")),
        *((name, _Strides) for name in ("grad_strides", "out_strides")),
        *((name, c_void_p) for name in ("offsets", "keys", "weights", "query_grad", "key_grad", "value_grad")),
        ("bias_grad", c_void_p),
        ("bias_grad_strides", _Places),
    )


def _filled(struct: type[S], **values: Any) -> S:
    """A struct with each of its fields given by name: ctypes leaves out what is missing, and takes names it lacks."""
    names = {field[0] for field in struct._fields_}
    if names != values.keys():
        raise TypeError(f"{struct.__name__} has other fields: {sorted(names ^ values.keys())}")
    return struct(**values)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native kernel; None, after one warning, where it cannot be had."""
    try:
        if os.name != "posix":
            raise BuildError("it is for Linux and macOS")
        from fx_passes.ops.cpu import cache

        found = cache.load(arch())
    except (BuildError, OSError) as error:
        warnings.warn(
            f"sus_attention has no native CPU kernel here and uses its slower PyTorch path: {error}", stacklevel=2
        )
        return None
    found.sus_forward.argtypes, found.sus_forward.restype = [POINTER(_Forward)], c_void_p
    found.sus_backward.argtypes, found.sus_backward.restype = [POINTER(_Backward)], ctypes.c_int
    found.sus_release_memory.argtypes, found.sus_release_memory.restype = [], c_int64
    found.sus_lists_usable.argtypes, found.sus_lists_usable.restype = [c_void_p], ctypes.c_int
    found.sus_lists_count.argtypes, found.sus_lists_count.restype = [c_void_p], c_int64
    found.sus_lists_export.argtypes, found.sus_lists_export.restype = [*(c_void_p,) * 4, c_int32], None
    found.sus_lists_free.argtypes, found.sus_lists_free.restype = [c_void_p], None
    return found


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    """As many threads as PyTorch uses; one after a fork, where the OpenMP pool of the parent does not exist."""
    return 1 if _forked else torch.get_num_threads()


def _strides(x: Tensor) -> _Strides:
    return _Strides(*x.stride()[:3])


def _broadcast(x: Tensor | None) -> tuple[int | None, _Places]:
    """Where a tensor of four dimensions lies, and its strides, 0 where it is broadcast."""
    if x is None:
        return None, _Places()
    return x.data_ptr(), _Places(*(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)))


def _ids(query: Tensor | None, key: Tensor | None) -> tuple[int | None, int | None, int, int]:
    """Where contiguous document ids lie, and their strides over the batch."""
    if query is None or key is None:
        return None, None, 0, 0
    steps = [0 if x.shape[0] == 1 else x.shape[1] for x in (query, key)]
    return query.data_ptr(), key.data_ptr(), steps[0], steps[1]


def _is_per_key(mask: Tensor | None) -> bool:
    """Whether a mask is the same for all heads and rows: it is then read when keys are packed, once for all rows."""
    return mask is not None and mask.shape[1:3] == (1, 1)


def call(problem: Problem) -> _Call:
    """The arguments that forward and backward share. The tensors of `problem` must outlive the result."""
    q, k, v, s = problem.query, problem.key, problem.value, problem.static
    key_mask, mask = (problem.attn_mask, None) if _is_per_key(problem.attn_mask) else (None, problem.attn_mask)
    key_mask_at, key_mask_strides = _broadcast(key_mask)
    mask_at, mask_strides = _broadcast(mask)
    bias_at, bias_strides = _broadcast(problem.attn_bias)
    query_ids, key_ids, query_ids_batch, key_ids_batch = _ids(problem.query_ids, problem.key_ids)
    ascend = all(x is not None and bool((x[:, 1:] >= x[:, :-1]).all()) for x in (problem.query_ids, problem.key_ids))
    return _filled(
        _Call,
        query=q.data_ptr(),
        key=k.data_ptr(),
        value=v.data_ptr(),
        query_strides=_strides(q),
        key_strides=_strides(k),
        value_strides=_strides(v),
        mask=key_mask_at,
        mask_batch=key_mask_strides.batch,
        mask_key=key_mask_strides.key,
        places=mask_at,
        places_strides=mask_strides,
        bias=bias_at,
        bias_strides=bias_strides,
        query_ids=query_ids,
        key_ids=key_ids,
        query_ids_batch=query_ids_batch,
        key_ids_batch=key_ids_batch,
        prefix=None if problem.prefix is None else problem.prefix.data_ptr(),
        prefix_batch=0 if problem.prefix is None else int(len(problem.prefix) > 1),
        sinks=None if problem.sinks is None else problem.sinks.data_ptr(),
        batch=q.shape[0],
        heads=q.shape[1],
        groups=k.shape[1],
        m=q.shape[2],
        n=k.shape[2],
        dk=-(-q.shape[3] // LANES) * LANES,
        dv=-(-v.shape[3] // LANES) * LANES,
        key_width=q.shape[3],
        value_width=v.shape[3],
        left=_NO_BOUND if s.left is None else min(s.left - problem.diagonal, _NO_BOUND),
        right=_NO_BOUND if s.right is None else min(s.right + problem.diagonal, _NO_BOUND),
        scale=s.scale,
        dtype=DTYPES[q.dtype],
        threads=_threads(),
        ids_ascend=int(ascend),
        softcap=s.softcap,
        dropout_factor=1 / (1 - s.dropout_p),
    )


class Lists:
    """Kept entries that a forward left in the native library's memory; a context manager that frees them."""

    def __init__(self, native: ctypes.CDLL, handle: int) -> None:
        self._native, self._handle = native, handle
        self.usable = bool(native.sus_lists_usable(handle))  # False: numbers beyond src/range.inc, and no results
        self.count: int = native.sus_lists_count(handle)

    def __enter__(self) -> Lists:
        return self

    def __exit__(self, *_: Any) -> None:
        self._native.sus_lists_free(self._handle)

    def export(self, offsets: Tensor, keys: Tensor, weights: Tensor) -> None:
        """Copy: offsets int64 [rows + 1], keys int32 [count], weights float32 [count]."""
        self._native.sus_lists_export(self._handle, offsets.data_ptr(), keys.data_ptr(), weights.data_ptr(), _threads())


def forward(
    native: ctypes.CDLL,
    problem: Problem,
    c: float,
    seed: int,
    dropout_seed: int,
    out: Tensor | None,
    maximum: Tensor | None,
    total: Tensor | None,
) -> Lists:
    """Fills out, maximum and total where they are given, and samples if c is above 0."""
    stream, dropout_stream = (stream_word(problem.static.site, x) % (1 << 32) for x in (STREAM_ROW, STREAM_DROPOUT))
    args = _filled(
        _Forward,
        call=call(problem),
        c=c,
        seed=seed % (1 << 64),
        dropout_seed=dropout_seed % (1 << 64),
        stream=stream,
        dropout_stream=dropout_stream,
        drop_below=problem.static.drop_below,
        out=None if out is None else out.data_ptr(),
        out_strides=_Strides() if out is None else _strides(out),
        maximum=None if maximum is None else maximum.data_ptr(),
        total=None if total is None else total.data_ptr(),
    )
    handle = native.sus_forward(byref(args))
    if not handle:
        raise MemoryError("sus_attention: out of memory in the forward")
    return Lists(native, handle)


def backward(
    native: ctypes.CDLL,
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    lists: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
) -> bool:
    """Fills the gradients of query, key, value and, if wanted, of the bias from lists (offsets, keys, weights).

    False for numbers beyond src/range.inc: the gradients are then of no use.
    """
    (offsets, keys, weights), (query_grad, key_grad, value_grad) = lists, gradients
    bias_grad, bias_grad_strides = _broadcast(bias)
    args = _filled(
        _Backward,
        call=call(problem),
        grad=grad.data_ptr(),
        out=out.data_ptr(),
        grad_strides=_strides(grad),
        out_strides=_strides(out),
        offsets=offsets.data_ptr(),
        keys=keys.data_ptr(),
        weights=weights.data_ptr(),
        query_grad=query_grad.data_ptr(),
        key_grad=key_grad.data_ptr(),
        value_grad=value_grad.data_ptr(),
        bias_grad=bias_grad,
        bias_grad_strides=bias_grad_strides,
    )
    status: int = native.sus_backward(byref(args))
    if status == 1:
        raise MemoryError("sus_attention: out of memory in the backward")
    return status == 0
