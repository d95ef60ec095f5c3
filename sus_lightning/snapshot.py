"""Saves everything that a call of ``training_step`` can change, and puts it back."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from fx_passes.state import Kept, State
from sus_lightning._lightning_compat import OWN_ATTRIBUTES, is_lightning_module

Restore = Callable[[], None]

# What nn.Module and LightningModule keep for themselves; a training step changes none of it.
_NOT_SAVED = (
    frozenset(vars(nn.Module())) - {"training"}
    | OWN_ATTRIBUTES
    | {
        "_compiled_call_impl",
        "log",  # these two: `gradients.muted` has put them there
        "log_dict",
    }
)


class Snapshot:
    """Random states, buffers, metric states, plain attributes of all modules, and the SUS state.

    Restored are: the generators of Python, NumPy, the CPU and the module's device; buffers and tensor attributes (in
    place, so that whoever else holds them sees the old values); numbers, strings, lists, dicts, sets and deques that
    are attributes of a module, with the tensors in them; attributes that were added; `requires_grad`; c, the
    counter and the counts of the SUS state. Torchmetrics are modules, so their states are among these.

    Not restored: objects of other classes that a module holds and that a training step changes, and anything outside
    the modules.

    Args:
        root: the LightningModule.
        state: the SUS state whose counter and counts are kept.
    """

    def __init__(self, root: nn.Module, state: State) -> None:
        self._rng = _random_states(_device(root))
        self._seen: dict[int, Restore | None] = {}
        self._restores: list[Restore] = []
        for module in root.modules():
            self._restores.append(self._module(module))
        self._requires_grad = [(p, p.requires_grad) for p in root.parameters()]
        self._state = state
        self._sus = (state.c, state.site_c, state.counter, Kept(**vars(state.kept)))

    def restore(self, random: bool = True) -> None:
        """Puts everything back, the generators too unless `random` is False; may be called again."""
        if random:
            for put in self._rng:
                put()
        with torch.no_grad():
            for restore in self._restores:
                restore()
        for parameter, requires_grad in self._requires_grad:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        c, site_c, self._state.counter, kept = self._sus
        self._state.c = c
        self._state.set_site_c(site_c)
        self._state.kept = Kept(**vars(kept))

    def _module(self, module: nn.Module) -> Restore:
        attributes = vars(module)
        before = {name: value for name, value in attributes.items() if name not in _NOT_SAVED}
        scripted = isinstance(module, torch.jit.ScriptModule)  # its buffers are in C++, and none can be added
        buffers = dict(module.named_buffers(recurse=False) if scripted else module._buffers)
        inner = [r for value in (*before.values(), *buffers.values()) if (r := self._value(value)) is not None]

        def restore() -> None:
            # Written only where it differs: Dynamo watches these dicts.
            _put_back(attributes, before, keep=_NOT_SAVED)
            if not scripted:
                _put_back(module._buffers, buffers)
            for r in inner:
                r()

        return restore

    def _value(self, value: Any) -> Restore | None:
        """How to put the inside of a value back, or None if it has no inside that is saved."""
        if id(value) in self._seen:
            return None
        if isinstance(value, nn.Parameter) or not isinstance(value, (Tensor, list, dict, set, deque)):
            return None
        self._seen[id(value)] = None
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, dict):
            saved_dict = dict(value)
            inner = [r for v in saved_dict.values() if (r := self._value(v)) is not None]

            def restore_dict() -> None:
                _put_back(value, saved_dict)
                for r in inner:
                    r()

            return restore_dict
        saved = list(value)
        inner = [r for v in saved if (r := self._value(v)) is not None] if not isinstance(value, set) else []

        def restore_items() -> None:
            if len(value) != len(saved) or any(a is not b for a, b in zip(value, saved, strict=True)):
                value.clear()
                value.update(saved) if isinstance(value, set) else value.extend(saved)
            for r in inner:
                r()

        return restore_items


def _put_back(current: dict[Any, Any], before: dict[Any, Any], keep: frozenset[str] = frozenset()) -> None:
    for key in [k for k in current if k not in before and k not in keep]:
        del current[key]
    for key, value in before.items():
        if key not in current or current[key] is not value:
            current[key] = value


def _tensor(value: Tensor) -> Restore | None:
    if value.is_inference() or value.device.type == "meta":
        return None
    saved = value.detach().clone()

    def restore() -> None:
        # Compared by value: torch.batch_norm writes its running statistics without a new version. Not written
        # where nothing changed: a graph that was kept may have saved this tensor.
        if not torch.equal(value, saved):
            value.detach().copy_(saved)

    return restore


def _device(root: nn.Module) -> torch.device:
    if is_lightning_module(root):
        return torch.device(cast(Any, root).device)
    return next((p.device for p in root.parameters()), torch.device("cpu"))


def _random_states(device: torch.device) -> list[Restore]:
    states: list[Restore] = []
    cpu, python = torch.get_rng_state(), random.getstate()
    states.append(lambda: torch.set_rng_state(cpu))
    states.append(lambda: random.setstate(python))
    if "numpy" in sys.modules:
        import numpy as np

        legacy = np.random.get_state()  # noqa: NPY002 (the legacy generator is the one that is global)
        states.append(lambda: np.random.set_state(legacy))  # noqa: NPY002
    if device.type not in ("cpu", "meta"):
        library = torch.get_device_module(device)
        on_device = library.get_rng_state(device) if device.type == "cuda" else library.get_rng_state()
        if device.type == "cuda":
            states.append(lambda: library.set_rng_state(on_device, device))
        else:
            states.append(lambda: library.set_rng_state(on_device))
    return states
