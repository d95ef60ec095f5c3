"""Reads what values mean: each value once, by the rule of its operator in `rules.py`, from a product with V upwards.

A reader knows one domain. `ProbsReader` reads a value as probabilities, which are a list of terms; `ScoresReader` reads
it as logits. What is neither is plain, and read as None: its axes are those of the value that it is combined with.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from fx_passes.canonicalise import rules
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, all_axes, broadcast, leaves, resolve
from fx_passes.canonicalise.contraction import Operand
from fx_passes.canonicalise.forms import Scores, Term, Walk, arguments
from fx_passes.canonicalise.operators import is_elementwise, name
from fx_passes.canonicalise.views import before, is_cast, is_view
from fx_passes.find.trace import Value

Meaning = TypeVar("Meaning")
_DEEPEST = 60  # operations between the product with V and a softmax
_MOST = 200  # operations behind a softmax in which a product of query and key is looked for


class Reader(Generic[Meaning]):
    """One domain, for one attention. `keys` are the axes that softmax, or the product with V, runs over."""

    def __init__(self, walk: Walk, keys: Dim) -> None:
        self.walk, self.keys = walk, keys
        self._known: dict[tuple[Value, Layout], Meaning | None] = {}

    def read(self, value: Value, layout: Layout) -> Meaning | None:
        """What a value with a layout means; None where it is plain."""
        key = (value, resolve(layout))
        if key not in self._known:
            self._known[key] = None
            if value.op is operator.getitem and value.args[1] == 0:  # of max, topk and the like
                value = Value(value.args[0].op, value.args[0].args, value.args[0].kwargs, value.fake)
            if value.op is not None and isinstance(value.fake, Tensor) and self._may_be(layout):
                self._known[key] = self._read(value, layout)
        return self._known[key]

    def operand(self, value: Any, layout: Layout) -> Meaning | None:
        """What an operand of an elementwise operation means, whose result has this layout."""
        if not isinstance(value, Value) or not isinstance(value.fake, Tensor):
            return None
        return self.read(value, broadcast(layout, value.shape))

    def over_keys(self, layout: Layout) -> bool:
        return bool(set(leaves(self.keys)) & set(all_axes(layout)))

    def _may_be(self, layout: Layout) -> bool:
        raise NotImplementedError

    def _read(self, value: Value, layout: Layout) -> Meaning | None:
        raise NotImplementedError


class ProbsReader(Reader[list[Term]]):
    """The probabilities in a product with V that sums over `keys`. FailedMatch: they are used in an unknown way."""

    def __init__(self, walk: Walk, keys: Dim, depth: int = 0) -> None:
        super().__init__(walk, keys)
        self.depth = depth
        self.unclear = ""  # why a view could not be followed

    def with_keys(self, keys: Dim) -> ProbsReader:
        return ProbsReader(self.walk, keys, self.depth)

    def _may_be(self, layout: Layout) -> bool:
        return self.depth <= _DEEPEST

    def _read(self, value: Value, layout: Layout) -> list[Term] | None:
        self.depth += 1
        if is_view(value) or is_cast(value):
            try:
                inner = before(value, layout) if is_view(value) else layout
            except FailedMatch as why:
                self.unclear, found = self.unclear or str(why), None
            else:
                found = self.read(value.args[0], inner)
        else:
            rule = rules.PROBS.get(value.op)
            found = None if rule is None else rule(self, value, layout)
        self.depth -= 1
        if found is not None:
            self.walk.visit(value)
        return found


@dataclass
class _Shared:
    """What the readers of one softmax's scores share: axes that the product's rows may be, and a count of values."""

    rows: list[Axis] = field(default_factory=list)
    count: int = 0


class ScoresReader(Reader[Scores]):
    """The logits of a softmax over `keys`. What is made of scores in an unknown way is read as scores with a `why`.

    `shifts`: a term that is the same for all keys changes nothing.
    """

    def __init__(self, walk: Walk, keys: Dim, layout: Layout, shifts: bool = True) -> None:
        super().__init__(walk, keys)
        self.shifts = shifts
        self.shared = _Shared([axis for axis in all_axes(layout) if axis not in leaves(keys)])
        self._exact: ScoresReader | None = None

    def exact(self) -> ScoresReader:
        """A reader for which a term that is the same for all keys is a bias like any other."""
        if self._exact is None:
            self._exact = self if not self.shifts else self.with_keys(self.keys)
            self._exact.shifts = False
        return self._exact

    def with_keys(self, keys: Dim) -> ScoresReader:
        """A reader of the same scores, above an operation that takes the keys from another axis."""
        found = ScoresReader(self.walk, keys, (), self.shifts)
        found.shared = self.shared
        return found

    def contains_qk_product(self, operand: Operand) -> bool:
        return contains_qk_product(self.walk, operand.value, operand.layout, self.keys)

    def _may_be(self, layout: Layout) -> bool:
        self.shared.count += 1
        return self.shared.count <= _MOST and self.over_keys(layout)

    def _read(self, value: Value, layout: Layout) -> Scores | None:
        if is_view(value) or is_cast(value):
            try:
                inner = before(value, layout) if is_view(value) else layout
            except FailedMatch:
                return None
            found = self.read(value.args[0], inner)
        else:
            rule = rules.SCORES.get(value.op, any_operation)
            try:
                found = rule(self, value, layout)
            except FailedMatch as why:
                found = Scores(Operand(value, layout), why=str(why))
        if found is None or found.why:
            return found
        return replace(found, visited=(*found.visited, value))


def any_operation(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """An operation without a rule: what acts on each element of scores makes scores, of which no more is known."""
    if is_elementwise(value) and any(reader.operand(x, layout) is not None for x in arguments(value)):
        raise FailedMatch(f"the scores go through {name(value)}")
    return None


def contains_qk_product(walk: Walk, value: Value, layout: Layout, keys: Dim) -> bool:
    """Whether a value is, elementwise or rearranged, made of a product of two activations that runs over `keys`.

    The product's rows, if it has such, must be an axis of the value too. Else what a linear layer makes of an
    attention's result, over whose features the layer sums, would be scores of its rows.
    """
    return ScoresReader(Walk(walk.trace, walk.constants), keys, layout).read(value, layout) is not None
