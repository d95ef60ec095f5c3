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
_DEEPEST = 80  # operations between a product with V and its softmax, or between softmax and the product of its scores
_MOST = 200  # operations behind a softmax in which a product of query and key is looked for


@dataclass
class _Shared:
    """What the readers of one region share.

    Attributes:
        rows: axes that the rows of a product of query and key may be.
        count, depth: operations that were read, and that are being read.
        unclear: why a view could not be followed.
    """

    rows: list[Axis] = field(default_factory=list)
    count: int = 0
    depth: int = 0
    unclear: str = ""


class Reader(Generic[Meaning]):
    """One domain, for one attention. `keys` are the axes that softmax, or the product with V, runs over."""

    def __init__(self, walk: Walk, keys: Dim, shared: _Shared | None = None) -> None:
        self.walk, self.keys, self.shared = walk, keys, shared or _Shared()
        self._known: dict[tuple[Value, Layout], Meaning | None] = {}

    def read(self, value: Value, layout: Layout) -> Meaning | None:
        """What a value with a layout means; None where it is plain."""
        key = (value, resolve(layout))
        if key in self._known:
            return self._known[key]
        if value.op is operator.getitem and value.args[1] == 0:  # of max, topk and the like
            value = Value(value.args[0].op, value.args[0].args, value.args[0].kwargs, value.fake)
        if value.op is None or self.shared.depth >= _DEEPEST or not self._may_be(layout):
            return None
        self.shared.depth += 1
        self.shared.count += 1
        try:
            found = self._known[key] = self._read(value, layout)
        finally:
            self.shared.depth -= 1
        return found

    def operand(self, value: Any, layout: Layout) -> Meaning | None:
        """What an operand of an elementwise operation means, whose result has this layout."""
        if not isinstance(value, Value) or not isinstance(value.fake, Tensor):
            return None
        return self.read(value, broadcast(layout, value.shape))

    def over_keys(self, layout: Layout) -> bool:
        return bool(set(leaves(self.keys)) & set(all_axes(layout)))

    def _above(self, value: Value, layout: Layout) -> Meaning | None:
        """What a view or a cast is one of; plain where the view cannot be followed."""
        try:
            inner = before(value, layout) if is_view(value) else layout
        except FailedMatch as why:
            self.shared.unclear = self.shared.unclear or str(why)
            return None
        return self.read(value.args[0], inner)

    def _may_be(self, layout: Layout) -> bool:
        return True

    def _read(self, value: Value, layout: Layout) -> Meaning | None:
        raise NotImplementedError


class ProbsReader(Reader[list[Term]]):
    """The probabilities in a product with V that sums over `keys`. FailedMatch: they are used in an unknown way."""

    def with_keys(self, keys: Dim) -> ProbsReader:
        return ProbsReader(self.walk, keys, self.shared)

    def _read(self, value: Value, layout: Layout) -> list[Term] | None:
        rule = rules.PROBS.get(value.op)
        if is_view(value) or is_cast(value):
            found = self._above(value, layout)
        else:
            found = None if rule is None else rule(self, value, layout)
        if found is not None:
            self.walk.visit(value)
        return found


class ScoresReader(Reader[Scores]):
    """The logits of a softmax over `keys`. What is made of scores in an unknown way is read as scores with a `why`.

    `shifts`: a term that is the same for all keys changes nothing.
    """

    def __init__(self, walk: Walk, keys: Dim, shared: _Shared, shifts: bool) -> None:
        super().__init__(walk, keys, shared)
        self.shifts = shifts
        self._exact: ScoresReader | None = None

    @staticmethod
    def of(walk: Walk, keys: Dim, layout: Layout, shifts: bool = True) -> ScoresReader:
        """A reader of what softmax is taken of, which has this layout."""
        return ScoresReader(
            walk, keys, _Shared([axis for axis in all_axes(layout) if axis not in leaves(keys)]), shifts
        )

    def exact(self) -> ScoresReader:
        """A reader for which a term that is the same for all keys is a bias like any other."""
        if self.shifts and self._exact is None:
            self._exact = ScoresReader(self.walk, self.keys, self.shared, False)
        return self._exact or self

    def with_keys(self, keys: Dim) -> ScoresReader:
        """A reader of the same scores, above an operation that takes the keys from another axis."""
        return ScoresReader(self.walk, keys, self.shared, self.shifts)

    def contains_qk_product(self, operand: Operand) -> bool:
        return contains_qk_product(self.walk, operand.value, operand.layout, self.keys)

    def _may_be(self, layout: Layout) -> bool:
        return self.shared.count < _MOST and self.over_keys(layout)

    def _read(self, value: Value, layout: Layout) -> Scores | None:
        try:
            if is_view(value) or is_cast(value):
                found = self._above(value, layout)
            else:
                found = rules.SCORES.get(value.op, any_operation)(self, value, layout)
        except FailedMatch as why:
            return Scores(Operand(value, layout), why=str(why))
        return found if found is None or found.why else replace(found, visited=(*found.visited, value))


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
    return ScoresReader.of(Walk(walk.trace, walk.constants), keys, layout).read(value, layout) is not None
