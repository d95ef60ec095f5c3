"""A guard on buffers whose values a rewrite relies on, such as nanoGPT's causal mask.

Before each call the buffers' identity and version counters are compared with those at compile time, which costs no
work on the device. Where they differ, the values are compared; if they differ too, the call runs the graph as it was
before the rewrite. (A write through `.data` moves no version counter; nothing in PyTorch can see it.)
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


class Guarded:
    """The original of a graph, taken before its rewrite, and the real buffers among its inputs."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> None:
        self.places = [n for n in gm.graph.nodes if n.op == "placeholder"]
        self.inputs = list(example_inputs)
        self.original = _shallow(gm)

    def wrap(
        self,
        compiled: Callable[..., Any],
        buffers: set[Node],
        compile_original: Callable[[GraphModule], Callable[..., Any]],
    ) -> Callable[..., Any]:
        """`compiled`, behind the guard if it relies on buffers."""
        if not buffers:
            return compiled
        watched = {i: Watched(self.inputs[i]) for i, n in enumerate(self.places) if n in buffers}
        original, fallback = self.original, [None]
        self.inputs = []

        def guarded(*args: Any) -> Any:
            if all(w.holds(args[i]) for i, w in watched.items()):
                return compiled(*args)
            if fallback[0] is None:
                fallback[0] = compile_original(original)  # type: ignore[call-overload]
            return fallback[0](*args)  # type: ignore[misc]

        return guarded


class Watched:
    """One buffer: which tensor it was, at which version, and a copy of its values."""

    def __init__(self, buffer: Tensor) -> None:
        self.last, self.version = weakref.ref(buffer), buffer._version
        self.values = buffer.detach().clone()

    def holds(self, buffer: Tensor) -> bool:
        if self.last() is buffer and self.version == buffer._version:
            return True
        if buffer.shape != self.values.shape or not torch.equal(buffer.to(self.values.device), self.values):
            return False
        self.last, self.version = weakref.ref(buffer), buffer._version
        return True


def _shallow(gm: GraphModule) -> GraphModule:
    """A graph module with its own graphs (those of bodies too) and the same tensors."""
    result = GraphModule(gm, copy.deepcopy(gm.graph))
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            setattr(result, name, _shallow(child))
    return result
