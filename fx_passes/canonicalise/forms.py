"""The canonical form of an attention: out = sum of terms, term = factors * softmax(scores) @ value.

scores = softcap(scale * factors * (query . key)) + biases, with masks; every tensor comes with the axes it runs over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_passes.canonicalise.axes import Dim, Layout, all_axes
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.contraction import Operand
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Trace, Value

BIG = -1e4  # a mask value at or below it leaves a weight of exactly zero beside any visible key


@dataclass(frozen=True)
class Factor:
    """A tensor, or a symbolic number (`fake` is a SymFloat or SymInt), that multiplies (power 1) or divides (-1)."""

    value: Value
    layout: Layout
    power: int = 1

    @staticmethod
    def number(number: Any, power: int = 1) -> Factor:
        return Factor(Value(None, (), {}, number), (), power)

    @property
    def axes(self) -> Dim:
        return all_axes(self.layout)


@dataclass
class Bias:
    """``scale * factors * value``, added to the scores."""

    value: Value
    layout: Layout
    scale: float = 1.0
    factors: list[Factor] = field(default_factory=list)


@dataclass
class Mask:
    """Entries where `value` differs from `keep` are set to `fill`, or get it added; `origin` is the tensor added.

    Where they are set, `over` is the number of biases that had been added before, and are lost there.
    """

    value: Value
    layout: Layout
    keep: bool
    fill: float
    origin: Bias | None = None
    over: int = 0


@dataclass
class Sink:
    """An extra logit per row that has no value: a tensor, or a number."""

    operand: Operand | None
    number: float = 0.0


@dataclass
class Scores:
    """Logits in canonical form; query and key are None where only the logits as a whole are known (tier 2).

    `wide` is set where they have columns without a value that are no sink: all columns, and the first of the keys'.
    """

    whole: Operand
    query: Operand | None = None
    key: Operand | None = None
    scale: float = 1.0
    factors: list[Factor] = field(default_factory=list)
    softcap: float = 0.0
    biases: list[Bias] = field(default_factory=list)
    masks: list[Mask] = field(default_factory=list)
    zeroed: list[Factor] = field(default_factory=list)  # constants of 0 and 1, until a mask is added where they are 0
    sink: Sink | None = None
    wide: tuple[Dim, int] | None = None
    why: str = ""  # for tier 2: what was not expressible
    visited: tuple[Value, ...] = ()  # every value that was gone through


@dataclass
class Term:
    """One softmax in the probabilities, with what happens to it before the product with value."""

    soft: Value
    source: Operand  # what softmax is taken of
    keys: Dim
    scale: float = 1.0
    factors: list[Factor] = field(default_factory=list)
    dropout: float = 0.0
    normalised: bool = True
    masks: list[Mask] = field(default_factory=list)  # acting on the probabilities: zero where masked
    shared_dropout: Value | None = None
    extension: tuple[Dim, int] | None = None  # the keys proper and their place among the softmax's columns
    sink: Sink | None = None  # a number added to the row sum
    plain: bool = False  # no softmax: its scale and factors, the same for all keys, are the probabilities
    mixed: Dim = ()  # axes of the softmax, such as heads, that are summed over behind it: the result is, too
    scores: Scores | None = None


@dataclass
class Attention:
    """What one rewrite replaces: the value `out`, whose layout is known, by the sum of `terms` times `value`.

    Attributes:
        out: the value that the rewrite replaces.
        value: V, with its layout.
        form: how it is written, for the report.
        visited: every value that the proof went through.
    """

    out: Value
    layout: Layout
    terms: list[Term]
    value: Operand
    form: str
    visited: list[Value]
    causal: bool = False  # F.scaled_dot_product_attention's is_causal


class Walk:
    """What the walks through one attention share: the trace, and which values they went through."""

    def __init__(self, trace: Trace, constants: Constants) -> None:
        self.trace = trace
        self.context: Context = trace.context
        self.constants = constants
        self.visited: list[Value] = []
        self.buffers: set[Node] = set()  # whose values the proof rests on
        self.claims: list[Any] = []  # `masks.MaskGuard`: what it assumes of symbolic sizes
        self.relations: list[Any] = []  # `relations.Relation`: what it assumes of inputs

    def visit(self, value: Value) -> None:
        self.visited.append(value)

    def constant(self, value: Value, buffers: bool = True) -> Tensor | None:
        """The constant that a value holds, on the CPU, or None if inputs, parameters or randomness decide it."""
        found = self.constants.evaluate(value)
        read = self.constants.buffers.get(value, frozenset())
        if found is None or (read and not buffers):
            return None
        self.buffers |= read
        return found


def level(context: Context, value: Value) -> Level:
    """What a value derives from."""
    if value.node is not None and value.node in context.position:
        found = context.level(value.node)
        return max(found, context.level(value.version)) if value.version is not None else found
    if value.op is None:
        return Level.CONSTANT
    found = max((level(context, v) for v in arguments(value)), default=Level.CONSTANT)
    product = value.op in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
    return Level.COMPUTED if product and found == Level.PARAMETER else found


def arguments(value: Value) -> Iterator[Value]:
    """The tensors that an operation reads."""
    for x in (*value.args, *value.kwargs.values()):
        if isinstance(x, Value):
            yield x
        elif isinstance(x, (list, tuple)):
            yield from (y for y in x if isinstance(y, Value))
