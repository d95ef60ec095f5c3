"""What differs between the releases of torch that are supported, 2.8 and newer. Nothing else asks for a version."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

# The flash kernel for the CPU of torch 2.8 reads and writes out of bounds where keys have fewer heads than queries.
CPU_KERNEL_HAS_GQA = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)


def inner_backend(backend: Any) -> Any:
    """What a callback of Dynamo, or a wrapper of a backend, calls; None for what wraps nothing."""
    # torch 2.8 has "callable" for "backend" in Dynamo's own callbacks.
    for name in ("compiler_fn", "_torchdynamo_orig_backend", "_torchdynamo_orig_callable"):
        inner = getattr(backend, name, None)
        if inner is not None:
            return inner
    return None


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
