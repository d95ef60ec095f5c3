"""What differs between the supported releases of torch (2.8 and newer) and Python. Nothing else asks for a version."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

# The flash kernel for the CPU of torch 2.8 reads and writes out of bounds where keys have fewer heads than queries.
CPU_KERNEL_HAS_GQA = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


# What a callback of Dynamo has around a backend; torch 2.8 calls it a callable.
_AROUND = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")


def _first(x: Any, *names: str) -> Any:
    for name in names:
        found = getattr(x, name, None)
        if found is not None:
            return found
    return None


def signature(function: Callable[..., Any]) -> inspect.Signature:
    """`inspect.signature`, also of a function whose annotations name what type checkers alone import.

    Python 3.14 evaluates annotations when they are asked for, so it lets a program define such a function.
    """
    if sys.version_info >= (3, 14):
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)


def inner_backend(backend: Any) -> Any:
    """What a callback of Dynamo, or a wrapper of a backend, calls; None for what wraps nothing."""
    return _first(backend, "compiler_fn", *_AROUND)


def innermost_backend(callback: Any) -> Any:
    """What torch.compile made of a backend, out of Dynamo's callback (torch 2.10 and older have no such function)."""
    while (inner := _first(callback, *_AROUND)) is not None:
        callback = inner
    return callback


def backend_of_entry(entry: Any) -> Any:
    """The backend that compiled an entry of Dynamo's cache; None before torch 2.10, where an entry does not say."""
    return getattr(entry, "backend", None)


@cache
def _fakes_symbolic_views() -> bool:
    from torch._subclasses import fake_impls

    return torch.ops.aten.view.default in fake_impls.op_implementations_dict


def symbolic_sizes() -> AbstractContextManager[Any]:
    """Lets fake tensors have symbolic sizes below autograd, where `aten.view` of torch 2.8 wants numbers."""
    if _fakes_symbolic_views():
        return contextlib.nullcontext()
    from torch._dispatch.python import enable_python_dispatcher

    manager: AbstractContextManager[Any] = enable_python_dispatcher()
    return manager
