"""The canonical form of an attention: out = sum of terms @ value, a term being factors * softmax(scores).

scores = softcap(scale * factors * (query . key)) + biases, with masks; every tensor comes with the axes it runs over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fx_passes.canonicalise.axes import Dim, Operand
from fx_passes.canonicalise.constants import Constants
from fx_passes.find.context import Context, Level
from fx_passes.find.trace import Trace, Value

BIG = -1e4  # a mask value at or below it leaves a weight of exactly zero beside any visible key


@dataclass(frozen=True)
class Factor(Operand):
    """A tensor, or a symbolic number (`fake` is a SymFloat or SymInt), that multiplies (power 1) or divides (-1)."""

    power: int = 1

    @staticmethod
    def number(number: Any, power: int = 1) -> Factor:
        return Factor(Value(None, (), {}, number), (), power)


@dataclass(frozen=True)
class Bias(Operand):
    """``scale * factors * value``, added to the scores."""

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()

    @property
    def wants_gradient(self) -> bool:
        node = self.value.node or self.value.home
        fake = None if node is None else node.meta.get("example_value")
        return not isinstance(fake, Tensor) or fake.requires_grad

    def times(self, number: float) -> Bias:
        return replace(self, scale=self.scale * number)


@dataclass(frozen=True)
class Mask(Operand):
    """Entries where `value` differs from `keep` are set to `fill`, or get it added; `bias` is the tensor added."""

    keep: bool
    fill: float
    bias: Bias | None = None

    def times(self, number: float) -> Mask:
        return self if math.isinf(self.fill) else replace(self, fill=self.fill * number)


@dataclass(frozen=True)
class Product:
    query: Operand
    key: Operand


@dataclass(frozen=True)
class Scores:
    """Logits in canonical form.

    Attributes:
        added: biases and masks, in the order in which they act.
        causal: a query sees the keys up to its own position, as F.scaled_dot_product_attention's is_causal has it.
        visited: every value that was gone through.
    """

    product: Product
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    softcap: float = 0.0
    added: tuple[Bias | Mask, ...] = ()
    causal: bool = False
    visited: tuple[Value, ...] = ()

    @property
    def is_linear(self) -> bool:
        """Whether the gradient of a score is, but for a number, that of the product's."""
        return not self.softcap

    @property
    def biases(self) -> list[Bias]:
        return [x for x in self.added if isinstance(x, Bias)]

    @property
    def masks(self) -> list[Mask]:
        return [x for x in self.added if isinstance(x, Mask)]


@dataclass(frozen=True)
class Columns:
    """The operand of a softmax over more columns than there are keys, the axes of all, and which is the first key."""

    source: Operand
    dim: Dim
    start: int


@dataclass(frozen=True)
class Softmax:
    """softmax of `source` over the keys; exp alone until it is `normalised`.

    Attributes:
        value: where it stands in the graph.
        sink: an extra logit per row that has no value: a tensor, or a number.
        columns: what it was taken of where that has columns without a value. They are the sink, or unknown.
    """

    value: Value
    source: Operand
    normalised: bool = True
    sink: Operand | float | None = None
    columns: Columns | None = None

    @property
    def keys_only(self) -> bool:
        """Whether all the weight of a row goes to the keys."""
        return self.sink is None and self.columns is None

    @property
    def unknown_columns(self) -> Columns | None:
        return self.columns if self.sink is None else None


@dataclass(frozen=True)
class Dropout:
    """`value` is the dropped tensor; None inside of F.scaled_dot_product_attention."""

    p: float
    value: Value | None = None


@dataclass(frozen=True)
class Plain:
    """``scale * factors``, which is added to probabilities as it is.

    Attributes:
        keys: the axes that the product with value sums over, and softmax is taken over.
        mixed: other axes, such as heads, that are summed over behind softmax.
    """

    keys: Dim
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    mixed: Dim = ()

    @property
    def normalised(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Term(Plain):
    """``scale * factors * dropout(softmax(scores))``, zero where masked.

    Attributes:
        masks: on the probabilities. Where they were normalised again the fill is -inf, else 0.
        scores: None where only the logits as a whole are known (tier 2), and before they are read.
    """

    softmax: Softmax
    dropout: Dropout | None = None
    masks: tuple[Mask, ...] = ()
    scores: Scores | None = None

    @property
    def normalised(self) -> bool:
        return self.softmax.normalised


@dataclass(frozen=True)
class Attention:
    """What one rewrite replaces: `out`, by the sum of `terms` and `plain` times `value`; `form` is for the report."""

    out: Operand
    terms: list[Term]
    plain: list[Plain]
    value: Operand
    form: str


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
