"""Symbolic sizes of a graph: which input tells each of them, and numbers to try in their place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

Sizes = dict[Any, int]  # by symbol


@dataclass(frozen=True)
class Symbols:
    """Where an input of the graph shows each symbol, as (input, dimension or None), and its size when compiled."""

    inputs: dict[Any, tuple[int, int | None]] = field(default_factory=dict)
    hints: Sizes = field(default_factory=dict)

    def read(self, args: Sequence[Any]) -> tuple[int, ...]:
        """The sizes in a call, in the order of `inputs`."""
        return tuple(int(args[i] if d is None else args[i].shape[d]) for i, d in self.inputs.values())

    def sizes(self, numbers: Sequence[int]) -> Sizes:
        return dict(zip(self.inputs, numbers, strict=True))


def symbols(placeholders: Sequence[Node]) -> Symbols:
    """The symbols that the inputs of a graph show by themselves, not only in expressions."""
    found = Symbols()
    for i, node in enumerate(placeholders):
        for dim, size in _sizes_of(node):
            expr, hint = size.node.expr, size.node.hint
            if expr.is_Symbol and hint is not None and expr not in found.inputs:
                found.inputs[expr], found.hints[expr] = (i, dim), int(hint)
    return found


def _sizes_of(node: Node) -> Iterator[tuple[int | None, torch.SymInt]]:
    fake = node.meta.get("example_value")
    if isinstance(fake, torch.SymInt):
        yield None, fake
    elif isinstance(fake, Tensor):
        for d, s in enumerate(fake.shape):
            if isinstance(s, torch.SymInt):
                yield d, s


def number(x: Any, sizes: Sizes | None) -> Any:
    """A symbolic number at given sizes; what is no symbolic number stays.

    ValueError: not all of its symbols are given.
    """
    if not isinstance(x, (torch.SymInt, torch.SymFloat)):
        return x
    value = None if sizes is None else x.node.expr.subs(sizes)
    if value is None or not value.is_number:
        raise ValueError(f"{x} is not known")
    return int(value) if isinstance(x, torch.SymInt) else float(value)
