"""Puts a backend under the submodules of a LightningModule, in place, and takes it away again.

Only instance attributes are exchanged (``Module._compiled_call_impl``, ``OptimizedModule.forward``, the step functions
that `torch.compile(LightningModule)` replaced), so parameters, hooks and state_dict keys stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch._dynamo import OptimizedModule

from fx_passes.rewrite.module_counts import Owner, compile_call
from fx_passes.torch_compat import innermost_backend
from sus_lightning._lightning_compat import compiled_as
from sus_lightning.caches import allow_compilation, clear_caches
from sus_lightning.targets import is_compiled, kind_of, may_attend, targets

_MISSING = object()

# Dynamo counts compilations per code object, over all backends, and past its limits (8 for one module, 256 for all) it
# runs the code uncompiled without an error: attention would lose SUS. What stands behind graph breaks may use them up.
_LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 2048}


@dataclass
class _Attribute:
    """One instance attribute with the value it has with our backend, and the one it had before."""

    owner: nn.Module
    name: str
    ours: Any
    theirs: Any = field(init=False)

    def __post_init__(self) -> None:
        self.theirs = vars(self.owner).get(self.name, _MISSING)

    def put(self, value: Any) -> None:
        # Not setattr: OptimizedModule and Module redirect it.
        if value is _MISSING:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = value


@dataclass
class Compilation:
    """The exchange for one module: `enable` and `disable` may be called in any order, as often as one likes."""

    backend: Callable[..., Any]
    attributes: list[_Attribute]
    modules: list[str]
    by_blocks: bool = False  # blocks that the user did not ask for, and that may not hold all attention
    enabled: bool = False
    _limits: dict[str, int] = field(default_factory=dict)

    def enable(self) -> None:
        if not self.enabled:
            config = torch._dynamo.config
            self._limits = {name: getattr(config, name) for name in _LIMITS}
            for name, limit in _LIMITS.items():
                setattr(config, name, max(self._limits[name], limit))
            for attribute in self.attributes:
                attribute.put(attribute.ours)
            allow_compilation({type(attribute.owner) for attribute in self.attributes})
            self.enabled = True

    def disable(self) -> None:
        if self.enabled:
            for attribute in reversed(self.attributes):
                attribute.put(attribute.theirs)
            for name, limit in self._limits.items():
                setattr(torch._dynamo.config, name, limit)
            self.enabled = False

    def clear(self) -> None:
        """To be called when it is not needed any more: frees what was compiled."""
        self.disable()
        clear_caches(self.backend)
        self.attributes.clear()


def plan(
    root: pl.LightningModule,
    backend: Callable[..., Any],
    modules: Sequence[str] | str | None = None,
    options: dict[str, Any] | None = None,
    apart: bool = False,
    blocks: bool = False,
) -> Compilation:
    """What to exchange so that attention below `root` is compiled with `backend`; nothing is changed yet.

    A module that the user compiled keeps the user's mode, options and dynamic. Where the user compiled none, the
    children of `root` are compiled (the items of a ModuleList or ModuleDict, as those are never called themselves).
    Modules below a compiled one are compiled too, for the case that they are called behind a graph break; where they
    are not, Dynamo traces them as parts of it. `training_step` is never compiled: `self.log` in it breaks Dynamo.

    Args:
        root: the LightningModule.
        backend: for torch.compile.
        modules: names of submodules to compile instead; "attention" is the blocks that repeat and may hold attention,
            and of a child without such blocks the child.
        options: further arguments of torch.compile, where the user compiled nothing.
        apart: no two modules share a graph.
        blocks: where the user chose nothing, of a stack of equal blocks those are compiled, and share their graphs.

    Raises:
        ValueError: a name in `modules` that `root` does not have.
    """
    attributes: list[_Attribute] = []
    options = _undo_outer(root, attributes) or options or {}
    paths = {module: path for path, module in root.named_modules()}
    exchange = _Exchange(backend, attributes, paths, apart)
    chosen = list(targets(root, modules, blocks and not attributes and not options and not apart))
    for target in chosen:
        module = target.module
        if module not in paths:
            paths.update((m, f"{target.path}.{name}".rstrip(".")) for name, m in module.named_modules())
        inside = [m for m in module.modules() if m is not module and is_compiled(m)]
        if modules is None and inside and not is_compiled(module):
            # The user chose regions within this child: keep them.
            for inner in inside:
                exchange(inner, {}, target.is_block)
        else:
            for inner in inside:
                if not (isinstance(module, OptimizedModule) and inner is module._orig_mod):
                    _bypass(inner, attributes)
            exchange(module, options, target.is_block)
    by_blocks = modules is None and any(target.is_block for target in chosen)
    return Compilation(backend, attributes, [target.path for target in chosen], by_blocks)


@dataclass
class _Exchange:
    """Exchanges modules for compiled ones. `codes` is by what equal blocks have in common: they share their code."""

    backend: Callable[..., Any]
    attributes: list[_Attribute]
    paths: dict[nn.Module, str]
    apart: bool = False
    codes: dict[Hashable, CodeType] = field(default_factory=dict)
    done: set[nn.Module] = field(default_factory=set)

    def __call__(self, module: nn.Module, options: dict[str, Any], is_block: bool = False) -> None:
        name, inner = "_compiled_call_impl", module
        if isinstance(module, OptimizedModule):
            name, inner = "forward", module._orig_mod
            if inner._compiled_call_impl is not None:
                _bypass(inner, self.attributes)
            options = _options_of(module.dynamo_ctx)
        elif module._compiled_call_impl is not None:
            options = _options_of(module._compiled_call_impl)
        if inner in self.done:
            return
        shared = is_block and not self.apart
        self._put(module, name, inner, options, shared)
        for below in _below(inner):
            if below not in self.done and not isinstance(below, OptimizedModule) and may_attend(below):
                self._put(below, "_compiled_call_impl", below, {**options, "fullgraph": False}, shared)

    def _put(self, module: nn.Module, name: str, inner: nn.Module, options: dict[str, Any], shared: bool) -> None:
        self.done.add(inner)
        path = self.paths.get(module, "").replace("._orig_mod", "")
        kind = kind_of(inner) if shared else None
        call, code = compile_call(Owner(path, inner, shared), self.codes.get(kind), backend=self.backend, **options)
        if shared:
            self.codes[kind] = code
        self.attributes.append(_Attribute(module, name, call))
        forward = type(inner).forward
        if self.apart and isinstance(forward, FunctionType) and "forward" not in vars(inner):
            self.attributes.append(_Attribute(inner, "forward", MethodType(_copied(forward), inner)))


def _copied(function: FunctionType) -> FunctionType:
    """A function with code of its own: what Dynamo compiles behind a graph break in it is no other module's."""
    code, name = function.__code__.replace(), function.__name__
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


def _below(module: nn.Module) -> Iterator[nn.Module]:
    """Modules below a module, without what stands in a forward that the user excluded by `torch.compiler.disable`."""
    for child in module.children():
        yield child
        if not getattr(getattr(child, "forward", None), "_torchdynamo_disable", False):
            yield from _below(child)


def _undo_outer(root: pl.LightningModule, attributes: list[_Attribute]) -> dict[str, Any]:
    """Takes compilation off the LightningModule itself; returns the options it was compiled with."""
    options: dict[str, Any] = {}
    compiled, originals = compiled_as(root)
    if compiled is not None:
        options = _options_of(compiled)
        attributes += [_Attribute(root, name, original) for name, original in originals.items()]
    if root._compiled_call_impl is not None:  # LightningModule.compile()
        options = options or _options_of(root._compiled_call_impl)
        _bypass(root, attributes)
    return options


def _bypass(module: nn.Module, attributes: list[_Attribute]) -> None:
    """Calls of `module` run uncompiled, hence are traced into the graph of what calls it."""
    if isinstance(module, OptimizedModule):
        attributes.append(_Attribute(module, "forward", module._orig_mod.__call__))
    elif module._compiled_call_impl is not None:
        attributes.append(_Attribute(module, "_compiled_call_impl", None))


def _options_of(compiled: Any) -> dict[str, Any]:
    """`options`, `dynamic` and `fullgraph` of something that torch.compile returned, as far as they can be read.

    A mode is a set of options to Inductor, which is how it is found again here.
    """
    if not hasattr(compiled, "callback"):
        code, cells = getattr(compiled, "__code__", None), getattr(compiled, "__closure__", None) or ()
        names = code.co_freevars if code is not None else ()
        inside = dict(zip(names, (cell.cell_contents for cell in cells), strict=False))
        compiled = inside.get("self")
    callback = getattr(compiled, "callback", None)
    if callback is None:
        return {}
    options: dict[str, Any] = {}
    wrapper: Any = innermost_backend(callback)
    patches = getattr(wrapper, "config", None)
    if isinstance(patches, dict) and patches:
        options["options"] = dict(patches)
    if getattr(wrapper, "dynamic", None) is not None:
        options["dynamic"] = wrapper.dynamic
    if getattr(compiled, "fullgraph", False):
        options["fullgraph"] = True
    return options
