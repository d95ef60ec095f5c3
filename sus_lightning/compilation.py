"""Puts a backend under the submodules of a LightningModule, in place, and takes it away again.

Only instance attributes are exchanged (``Module._compiled_call_impl``, ``OptimizedModule.forward``, the step functions
that `torch.compile(LightningModule)` replaced), so parameters, hooks and state_dict keys stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torchmetrics import Metric

_MISSING = object()

# Dynamo counts compilations per code object, over all backends, and past its limit (8) it runs the code uncompiled
# without an error: attention would lose SUS. Layers that differ in an attribute, and earlier fits, use it up.
_RECOMPILE_LIMIT = 64


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

    attributes: list[_Attribute]
    modules: list[str]
    enabled: bool = False
    _limit: int = 0

    def enable(self) -> None:
        if not self.enabled:
            self._limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(self._limit, _RECOMPILE_LIMIT)
            for attribute in self.attributes:
                attribute.put(attribute.ours)
            self.enabled = True

    def disable(self) -> None:
        if self.enabled:
            for attribute in reversed(self.attributes):
                attribute.put(attribute.theirs)
            torch._dynamo.config.recompile_limit = self._limit
            self.enabled = False


def plan(
    root: pl.LightningModule,
    backend: Callable[..., Any],
    modules: Sequence[str] | None = None,
    options: dict[str, Any] | None = None,
) -> Compilation:
    """What to exchange so that attention below `root` is compiled with `backend`; nothing is changed yet.

    A module that the user compiled keeps the user's mode, options and dynamic. Where the user compiled none, the
    children of `root` are compiled (the items of a ModuleList or ModuleDict, as those are never called themselves).
    `training_step` is never compiled: `self.log` in it breaks Dynamo.

    Args:
        root: the LightningModule.
        backend: for torch.compile.
        modules: names of submodules to compile instead.
        options: further arguments of torch.compile, where the user compiled nothing.

    Raises:
        ValueError: a name in `modules` that `root` does not have.
    """
    attributes: list[_Attribute] = []
    names: list[str] = []
    options = _undo_outer(root, attributes) or options or {}
    for name, module in _named_targets(root, modules):
        names.append(name)
        compiled_inside = [m for m in module.modules() if m is not module and _is_compiled(m)]
        if modules is None and compiled_inside and not _is_compiled(module):
            # The user chose regions within this child: keep them.
            for inner in compiled_inside:
                _exchange(inner, backend, {}, attributes)
        else:
            for inner in compiled_inside:
                if not (isinstance(module, OptimizedModule) and inner is module._orig_mod):
                    _bypass(inner, attributes)
            _exchange(module, backend, options, attributes)
    return Compilation(attributes, names)


def _undo_outer(root: pl.LightningModule, attributes: list[_Attribute]) -> dict[str, Any]:
    """Takes compilation off the LightningModule itself; returns the options it was compiled with."""
    options: dict[str, Any] = {}
    context = root._compiler_ctx
    if context is not None:  # torch.compile(LightningModule), as Lightning's from_compiled leaves it
        options = _options_of(context["dynamo_ctx"])
        for name in ("forward", "training_step"):
            attributes.append(_Attribute(root, name, context[f"original_{name}"]))
    if root._compiled_call_impl is not None:  # LightningModule.compile()
        options = options or _options_of(root._compiled_call_impl)
        _bypass(root, attributes)
    return options


def _named_targets(root: nn.Module, modules: Sequence[str] | None) -> Iterator[tuple[str, nn.Module]]:
    if modules is not None:
        for name in modules:
            try:
                yield name, root.get_submodule(name)
            except AttributeError:
                known = ", ".join(repr(n) for n, _ in root.named_children())
                raise ValueError(
                    f"modules must name submodules of {type(root).__name__} (its children are {known}), "
                    f"but it has {name!r}"
                ) from None
        return
    yield from _children(root, "")


def _children(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(child, f"{prefix}{name}.")
        elif not isinstance(child, Metric) and not _is_library_leaf(child):
            yield prefix + name, child


def _is_library_leaf(module: nn.Module) -> bool:
    """torch's own layers without children: losses, linear layers, norms. None of them has attention."""
    return type(module).__module__.startswith("torch.nn.modules.") and not any(True for _ in module.children())


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _exchange(
    module: nn.Module, backend: Callable[..., Any], options: dict[str, Any], attributes: list[_Attribute]
) -> None:
    if isinstance(module, OptimizedModule):
        inner = module._orig_mod
        if inner._compiled_call_impl is not None:
            _bypass(inner, attributes)
        options = _options_of(module.dynamo_ctx)
        attributes.append(_Attribute(module, "forward", torch.compile(inner._call_impl, backend=backend, **options)))
        return
    if module._compiled_call_impl is not None:
        options = _options_of(module._compiled_call_impl)
    compiled = torch.compile(module._call_impl, backend=backend, **options)
    attributes.append(_Attribute(module, "_compiled_call_impl", compiled))


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
    from torch._dynamo.eval_frame import innermost_backend

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
