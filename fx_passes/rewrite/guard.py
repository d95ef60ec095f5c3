"""A guard on what a rewrite relies on: buffers' values, such as nanoGPT's causal mask, and masks over symbolic sizes.

Before each call the buffers' identity and version counters are compared with those at compile time, which costs no
work on the device. Where they differ, the values are compared; if they differ too, the call runs the graph as it was
before the rewrite. (A write through `.data` moves no version counter; nothing in PyTorch can see it.)
Sizes that were not seen before have their masks computed once, on the CPU.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fx_passes.canonicalise.masks.lower import MaskGuard
from fx_passes.find.sizes import Symbols, symbols
from fx_passes.rewrite.graph import Result

log = logging.getLogger(__name__)


class Guarded:
    """The original of a graph, taken before its rewrite, and the real buffers among its inputs."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        self.placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.inputs = list(example_inputs)
        self.original = _shallow(gm)

    def wrap(
        self,
        compiled: Callable[..., Any],
        result: Result,
        compile_original: Callable[[GraphModule], Callable[..., Any]],
    ) -> Callable[..., Any]:
        """`compiled`, behind the guard if its rewrite relies on anything."""
        if not result.buffers and not result.claims and not result.relations:
            return compiled
        related = {
            (inputs, relation.holds): RelationGuard(inputs, relation.holds)
            for relation in result.relations
            for inputs in [tuple(self.placeholders.index(node) for node in relation.nodes)]
        }
        watched = {i: BufferGuard(self.inputs[i]) for i, n in enumerate(self.placeholders) if n in result.buffers}
        lengths = ShapeGuard(symbols(self.placeholders), result.claims)
        original, fallback = self.original, [None]
        self.inputs = []

        def guarded(*args: Any) -> Any:
            if not lengths.hold(args):
                return original(*args)  # its sizes are symbols, for which no compiler would stand in any more
            if all(w.holds(args[i]) for i, w in watched.items()) and all(r.holds(args) for r in related.values()):
                return compiled(*args)
            if fallback[0] is None:
                fallback[0] = compile_original(original)  # type: ignore[call-overload]
            return fallback[0](*args)  # type: ignore[misc]

        return guarded


class ShapeGuard:
    """Claims on masks over symbolic sizes, and the sizes at which they were checked."""

    def __init__(self, where: Symbols, claims: list[MaskGuard]) -> None:
        self.where, self.claims = where, claims
        self.checked: dict[tuple[int, ...], bool] = {}

    def hold(self, args: Sequence[Any]) -> bool:
        if not self.claims:
            return True
        numbers = self.where.read(args)
        if numbers not in self.checked:
            sizes = self.where.sizes(numbers)
            self.checked[numbers] = all(claim.holds(sizes) for claim in self.claims)
            for claim in self.claims:
                claim.constants.forget()
            if not self.checked[numbers]:
                log.warning("at sizes %s a mask is not what it was: attention runs with its exact backward", sizes)
        return self.checked[numbers]


class RelationGuard:
    """A relation between inputs, and for which tensors, at which versions, it was seen to hold."""

    def __init__(self, inputs: tuple[int, ...], relation: Callable[..., bool]) -> None:
        self.inputs, self.relation = inputs, relation
        self.last: tuple[Any, ...] = ()

    def holds(self, args: Sequence[Any]) -> bool:
        tensors = [args[i] for i in self.inputs]
        if len(self.last) == len(tensors) and all(
            ref() is x and version == x._version for (ref, version), x in zip(self.last, tensors, strict=True)
        ):
            return True
        if not self.relation(*tensors):
            return False
        self.last = tuple((weakref.ref(x), x._version) for x in tensors)
        return True


class BufferGuard:
    """One buffer: which tensor it was, at which version, and a copy of its values."""

    def __init__(self, buffer: Tensor) -> None:
        self.last, self.version = weakref.ref(buffer), _version(buffer)
        self.values = buffer.detach().clone()

    def holds(self, buffer: Tensor) -> bool:
        version = _version(buffer)
        if self.last() is buffer and self.version == version and version is not None:
            return True
        if (buffer.shape, buffer.dtype) != (self.values.shape, self.values.dtype) or buffer.device.type == "meta":
            return False
        if not torch.equal(buffer.to(self.values.device), self.values):
            return False
        self.last, self.version = weakref.ref(buffer), version
        return True


def _version(buffer: Tensor) -> int | None:
    """The version counter; None for a tensor made in inference mode, which has none."""
    return None if buffer.is_inference() else buffer._version


def _shallow(gm: GraphModule) -> GraphModule:
    """A graph module with its own graphs (those of bodies too) and the same tensors."""
    result = GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            setattr(result, name, _shallow(child))
    return result
