"""Reads what values mean: each value once, by the rule of its operator in `rules.py`, from a product with V upwards.

A reader knows one domain. `ProbsReader` reads a value as probabilities, which are a list of terms; `ScoresReader` reads
it as logits. What is neither is plain, and read as None: its axes are those of the value that it is combined with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from fx_passes.canonicalise import rules
from fx_passes.canonicalise.axes import Axis, Dim, FailedMatch, Layout, Operand, leaves, resolve
from fx_passes.canonicalise.forms import Plain, Scores, Walk, arguments
from fx_passes.canonicalise.operators import is_elementwise, name
from fx_passes.canonicalise.views import above
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

    rules: ClassVar[dict[Any, Callable[..., Any]]]

    def __init__(self, walk: Walk, keys: Dim, shared: _Shared | None = None) -> None:
        self.walk, self.keys, self.shared = walk, keys, shared or _Shared()
        self._known: dict[tuple[Value, Layout], Meaning | FailedMatch | None] = {}

    def read(self, x: Operand) -> Meaning | None:
        """What a value means; None where it is plain.

        FailedMatch: it is made of what this reader looks for, in a way that the canonical form has no place for.
        """
        key = (x.value, resolve(x.layout))
        if key not in self._known:
            value = x.value
            if value.op is operator.getitem and value.args[1] == 0:  # of max, topk and the like
                source = value.args[0]
                x = Operand(Value(source.op, source.args, source.kwargs, value.fake), x.layout)
            if value.op is None or self.shared.depth >= _DEEPEST or not self._may_be(x):
                return None
            self.shared.depth += 1
            self.shared.count += 1
            try:
                self._known[key] = self._read(x)
            except FailedMatch as why:
                self._known[key] = why
            finally:
                self.shared.depth -= 1
        found = self._known[key]
        if isinstance(found, FailedMatch):
            raise found.with_traceback(None)
        return found

    def holds(self, x: Operand) -> bool:
        """Whether a value is not plain."""
        try:
            return self.read(x) is not None
        except FailedMatch:
            return True

    def operand(self, x: Operand, value: Any) -> Meaning | None:
        """What an operand of the elementwise operation x means."""
        if not isinstance(value, Value) or not isinstance(value.fake, Tensor):
            return None
        return self.read(x.side(value))

    def any_operand(self, x: Operand) -> bool:
        """Whether an operand of the elementwise operation x is not plain."""
        return any(isinstance(v.fake, Tensor) and self.holds(x.side(v)) for v in arguments(x.value))

    def _may_be(self, x: Operand) -> bool:
        return True

    def _read(self, x: Operand) -> Meaning | None:
        try:
            source = above(x)
        except FailedMatch as why:
            self.shared.unclear = self.shared.unclear or str(why)
            return None
        rule: Callable[..., Any] = self.rules.get(x.value.op, _any_operation)
        found = rule(self, x) if source is None else self.read(source)
        return found if found is None else self._passed(x.value, found)

    def _passed(self, value: Value, found: Meaning) -> Meaning:
        raise NotImplementedError


class ProbsReader(Reader[Sequence[Plain]]):
    """The probabilities in a product with V that sums over `keys`, as terms."""

    rules = rules.PROBS

    def with_keys(self, keys: Dim) -> ProbsReader:
        return ProbsReader(self.walk, keys, self.shared)

    def _passed(self, value: Value, found: Sequence[Plain]) -> Sequence[Plain]:
        self.walk.visited.append(value)
        return found


class ScoresReader(Reader[Scores]):
    """The logits of a softmax over `keys`.

    `shifts`: a term that is the same for all keys changes nothing.
    """

    rules = rules.SCORES

    def __init__(self, walk: Walk, keys: Dim, shared: _Shared, shifts: bool) -> None:
        super().__init__(walk, keys, shared)
        self.shifts = shifts
        self._exact: ScoresReader | None = None

    @staticmethod
    def of(walk: Walk, keys: Dim, layout: Layout, shifts: bool = True) -> ScoresReader:
        """A reader of what softmax is taken of, which has this layout."""
        others = [axis for axis in leaves(a for dim in layout for a in dim) if axis not in leaves(keys)]
        return ScoresReader(walk, keys, _Shared(others), shifts)

    def exact(self) -> ScoresReader:
        """A reader for which a term that is the same for all keys is a bias like any other."""
        if self.shifts and self._exact is None:
            self._exact = ScoresReader(self.walk, self.keys, self.shared, False)
        return self._exact or self

    def with_keys(self, keys: Dim) -> ScoresReader:
        """A reader of the same scores, above an operation that takes the keys from another axis."""
        return ScoresReader(self.walk, keys, self.shared, self.shifts)

    def contains_qk_product(self, x: Operand) -> bool:
        return contains_qk_product(self.walk, x, self.keys)

    def _may_be(self, x: Operand) -> bool:
        return self.shared.count < _MOST and x.over(self.keys)

    def _passed(self, value: Value, found: Scores) -> Scores:
        return replace(found, visited=(*found.visited, value))


def _any_operation(reader: Reader[Any], x: Operand) -> None:
    """An operation without a rule ends probabilities. What acts on each element of scores makes scores (tier 2)."""
    if isinstance(reader, ScoresReader) and is_elementwise(x.value) and reader.any_operand(x):
        raise FailedMatch(f"the scores go through {name(x.value)}")


def contains_qk_product(walk: Walk, x: Operand, keys: Dim) -> bool:
    """Whether a value is, elementwise or rearranged, made of a product of two activations that runs over `keys`.

    The product's rows, if it has such, must be an axis of the value too. Else what a linear layer makes of an
    attention's result, over whose features the layer sums, would be scores of its rows.
    """
    return ScoresReader.of(Walk(walk.trace, walk.constants), keys, x.layout).holds(x)
