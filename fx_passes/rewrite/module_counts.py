"""Whose attention a graph holds: the module that Dynamo compiles, and the modules that run the graph later.

A graph that is not entered from the top of a model (behind a graph break, or where a module was compiled by itself)
names its modules relative to the frame that Dynamo traced, gets their parameters as inputs, and may serve every module
of the same code. `compile_call` knows whose call is running. Without it the first parameter of a call tells modules
apart. (All parameters would count a layer twice whose recompilation reads one parameter more.)
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fx_passes.find.context import is_parameter
from fx_passes.report import Key, Report

_number = itertools.count()
_MOST = 4096  # modules that are told apart: `functional_call` may bring new parameters in every step


@dataclass(frozen=True)
class Owner:
    """A module that was compiled by itself, and its path in the model.

    `shared` says that its code is that of other modules too, so that one graph may serve all of them.
    """

    path: str
    module: nn.Module
    shared: bool = False


class _Running(threading.local):
    def __init__(self) -> None:
        self.owners: list[Owner] = []
        self.depth = 0


_running = _Running()


def runs_a_site() -> bool:
    """Whether this thread is inside of a compiled graph whose attentions were found."""
    return _running.depth > 0


def compile_call(owner: Owner, code: CodeType | None = None, **options: Any) -> tuple[Callable[..., Any], CodeType]:
    """What to put into `Module._compiled_call_impl`, and the code object that Dynamo's caches are at.

    Unlike what `Module.compile` puts there, its frame is none of torch.nn's, which Dynamo would skip, and its code is
    its own: caches and the recompile limit are apart from those of other modules and of earlier compilations.

    Args:
        owner: the module.
        code: that of another call of this function, to share its graphs; None makes new code.
        options: of torch.compile.
    """
    module = owner.module

    def entry(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    # Dynamo remembers by file, line and name which sizes have changed and are to be dynamic: those of another module.
    entry.__code__ = entry.__code__.replace(co_name=f"entry_{next(_number)}") if code is None else code
    compiled = torch.compile(entry, **options)

    def call(*args: Any, **kwargs: Any) -> Any:
        _running.owners.append(owner)
        try:
            return compiled(*args, **kwargs)
        finally:
            _running.owners.pop()

    # Dynamo does not compile the frame of `call`, and traces `entry` where it would inline it.
    torch._dynamo.decorators.skip_code(call.__code__)  # type: ignore[attr-defined]
    call._torchdynamo_inline = entry  # type: ignore[attr-defined]
    return call, entry.__code__


@dataclass(frozen=True)
class Frame:
    """Where Dynamo's frame stands: the path of its module in the model, and the owner whose call is running."""

    path: str = ""
    owner: Owner | None = None

    def named(self, module: str) -> str:
        """A path in a graph of this frame as a path in the model."""
        return _join(self.path, module)

    def of(self, owner: str, module: str) -> str:
        """The same place in another owner that runs the graph."""
        return module if self.owner is None else _join(owner, module[len(self.owner.path) :].lstrip("."))


def this_frame(gm: GraphModule, apart: bool = False) -> Frame:
    """The frame that Dynamo compiles now.

    Where nothing else tells modules apart that may run its graph, and with `apart` always, the frame is pinned to its
    module: other modules get a graph of their own.
    """
    owner = _running.owners[-1] if _running.owners else None
    name, module = _module_of_frame(owner)
    pinned = module is not None and (apart or (owner is None and first_parameter(gm) is None))
    if pinned:
        _pin(name)
    if owner is not None:
        return Frame(owner.path if module is None else _path(owner.module, module, owner.path), owner)
    return Frame(_path(_outermost(), module, "")) if module is not None and pinned else Frame()


def _path(root: nn.Module | None, module: nn.Module, prefix: str) -> str:
    names = () if root is None else root.named_modules()
    return _join(prefix, next((name for name, m in names if m is module), ""))


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _module_of_frame(owner: Owner | None) -> tuple[str, nn.Module | None]:
    """The module whose method Dynamo compiles, with the local variable that it is in."""
    try:
        root = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
    except (AttributeError, AssertionError):
        return "", None  # not called by Dynamo
    code, values = getattr(root, "f_code", None), getattr(root, "f_locals", {})
    names = [] if code is None else [n for n in code.co_varnames if isinstance(values.get(n), nn.Module)]
    name = next((n for n in names if owner is not None and values[n] is owner.module), "")
    name = name or ("self" if "self" in names else names[0] if names else "")
    return name, values.get(name)


def _pin(name: str) -> None:
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import LocalSource

    output = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output
    output.guards.add(LocalSource(name, is_input=True).make_guard(GuardBuilder.ID_MATCH))


def _outermost() -> nn.Module | None:
    """The outermost module below the call of torch.compile's result that is running."""
    frame, found = sys._getframe(), None
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        found = module_of(frame) or found
        frame = frame.f_back  # type: ignore[assignment]
    return found


def _caller() -> nn.Module | None:
    """The innermost module whose method is running."""
    frame, module = sys._getframe(), None
    while frame is not None and module is None and frame.f_code.co_name != "compile_wrapper":
        module, frame = module_of(frame), frame.f_back  # type: ignore[assignment]
    return module


def module_of(frame: FrameType) -> nn.Module | None:
    """The module whose method a Python frame runs, if it is a method of one; graphs are none."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    return first if isinstance(first, nn.Module) and not isinstance(first, GraphModule) else None


def first_parameter(gm: GraphModule) -> int | None:
    """The position of a graph's first parameter among its inputs, or None."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return next((i for i, n in enumerate(placeholders) if is_parameter(n)), None)


def count_owners(
    compiled: Callable[..., Any], report: Report, sites: Sequence[Key], parameter: int | None, frame: Frame
) -> Callable[..., Any]:
    """`compiled`, which tells the report of each module that it has not yet run in."""
    if not sites:
        return compiled
    seen: set[int | str] = set()

    def counted(*args: Any) -> Any:
        owner: int | str
        if _running.owners:
            owner = _running.owners[-1].path
        else:
            owner = id(_caller()) if parameter is None else id(args[parameter])
        if owner not in seen and len(seen) < _MOST:
            seen.add(owner)
            report.ran(sites, owner, frame.of)
        _running.depth += 1
        try:
            return compiled(*args)
        finally:
            _running.depth -= 1

    return counted
