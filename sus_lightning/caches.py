"""Dynamo's caches between fits: room for new compilations, and nothing left of old ones.

What is compiled from the top of a module has code of its own (`fx_passes.rewrite.module_counts`), and is freed with
it. What Dynamo compiles behind a graph break is kept at the code of the user's methods, for all who run them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from types import CodeType, FunctionType
from typing import Any, cast

import torch
from torch import nn

from fx_passes.find.dynamo_patches import free_traces
from fx_passes.rewrite import module_counts
from fx_passes.torch_compat import backend_of_entry

_MOST_DEAD = 32  # invalid entries that stay at one code


def allow_compilation(classes: Iterable[type[nn.Module]]) -> None:
    """Takes back that Dynamo runs methods of these classes uncompiled, as it does past its limit for other backends."""
    from torch._C._dynamo import eval_frame

    strategy = eval_frame._FrameExecStrategy(eval_frame._FrameAction.DEFAULT, eval_frame._FrameAction.DEFAULT)
    for code in {code for cls in classes for code in _methods(cls)}:
        eval_frame.set_code_exec_strategy(code, strategy)


def _methods(cls: type) -> Iterator[CodeType]:
    for base in cls.__mro__:
        if not base.__module__.startswith(("torch.", "lightning.", "pytorch_lightning.")) and base is not object:
            yield from (f.__code__ for f in vars(base).values() if isinstance(f, FunctionType))


def clear_caches(backend: Callable[..., Any]) -> None:
    """Frees what Dynamo has compiled with a backend, and nothing of others. Before torch 2.10 its entries stay."""
    from torch._dynamo import convert_frame, eval_frame

    managers: list[Any] = []
    cleared: set[str] = set()
    for reference in list(convert_frame.input_codes.seen):
        code = reference()
        of_code = _clear(code, backend) if code is not None else []
        if code is not None and of_code:
            managers += of_code
            cleared.add(code.co_name)
    _forget(managers)
    _forget_sizes(cleared)
    free_traces(backend)
    for key, known in list(eval_frame.cached_backends.items()):
        if _is(known, backend):
            del eval_frame.cached_backends[key]


def _clear(code: CodeType, backend: Callable[..., Any]) -> list[Any]:
    """Frees the entries of a backend at one code; returns the guard managers that they had."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.guards import DeletedGuardManagerWrapper

    entries = _debug_get_cache_entry_list(code)
    dead = [e for e in entries if isinstance(e.guard_manager, DeletedGuardManagerWrapper)]
    ours = [e for e in entries if e not in dead and _is(backend_of_entry(e), backend)]
    managers, compiled = [e.guard_manager for e in ours], [e.code for e in ours]
    if not ours:
        return []
    if len(ours) + len(dead) == len(entries) or len(ours) + len(dead) > _MOST_DEAD:
        torch._C._dynamo.eval_frame.reset_code(code)
    else:
        for entry, manager in zip(ours, managers, strict=True):  # it stays in the list, empty
            cast(Any, manager.extra_state).invalidate(
                entry, DeletedGuardManagerWrapper("its backend is not in use any more")
            )
    for made in compiled:
        _remove_globals(made)
    return managers


def _remove_globals(code: CodeType) -> None:
    """Removes graphs and resume functions of code that Dynamo made from the globals of the user's module.

    Dynamo does so when the code dies. Behind a graph break it never does: the graph of an inner frame was traced with
    this code on the stack, and its tracebacks keep the code, out of the garbage collector's sight.
    """
    from torch._dynamo.utils import CleanupManager

    hooks = CleanupManager.instance
    if code in hooks:
        for hook in hooks[code]:
            hook()
        hooks[code] = []


def _forget(managers: Sequence[Any]) -> None:
    """Frees guard managers: the finalizers of what their guards name, functions of torch among them, keep them."""
    known = set(map(id, managers))
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        alive = finalizer.peek()
        function = getattr(alive[1], "func", alive[1]) if alive else None
        check = getattr(function, "__self__", None)  # Dynamo's CheckFunctionManager
        if id(getattr(check, "guard_manager", None)) in known:
            finalizer.detach()
    for manager in managers:
        vars(manager).clear()
        manager.cache_entry = manager.extra_state = None


def _forget_sizes(names: Set[str]) -> None:
    """Forgets the sizes that Dynamo has seen at our own code of these names, to learn which are dynamic."""
    from torch._dynamo import pgo

    sizes = pgo.get_code_state()
    for key in [k for k in sizes if k.name in names and k.filename == module_counts.__file__]:
        del sizes[key]


def _is(known: Any, backend: Callable[..., Any]) -> bool:
    return getattr(known, "compiler_fn", known) is backend
