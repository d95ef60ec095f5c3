"""What a proof relies on that holds between inputs, and is checked at each call: see `fx_passes.rewrite.guard`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from fx_passes.find.context import Context


@dataclass(frozen=True)
class Relation:
    """`holds` is true of the inputs behind these nodes of the outermost graph."""

    nodes: tuple[Node, ...]
    holds: Callable[..., bool]


def relation(context: Context, nodes: tuple[Node, ...], holds: Callable[..., bool]) -> Relation | None:
    """A relation, if these nodes are inputs for which it holds at compile time."""
    tensors = [context.given(node) for node in nodes]
    if any(x is None for x in tensors) or not holds(*tensors):
        return None
    return Relation(tuple(context.source(node) for node in nodes), holds)


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def aligned(positions: Tensor, ids: Tensor) -> bool:
    """Whether, within each document, positions go up by 1, so that their distances are those of the positions."""
    if positions.shape != ids.shape or positions.device != ids.device:
        return False
    steps = ids.diff(dim=-1)
    return bool(((steps > 0) | ((steps == 0) & (positions.diff(dim=-1) == 1))).all())
