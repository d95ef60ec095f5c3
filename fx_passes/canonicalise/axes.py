"""Axes: what a dimension means, kept through views, permutations and broadcasts.

A layout gives, for each dimension of a tensor, the axes that it runs over, outermost first. A dimension of size 1 runs
over none, unless a product sums over it: that of a single key is an axis, too. Where a view splits a dimension, its
axis gets parts, and every layout that names the axis names the parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx.experimental.symbolic_shapes import statically_known_true

from fx_passes.find.trace import Value

Size = Any  # int or torch.SymInt


class FailedMatch(Exception):
    """Why an attention is left as it is, in words for the user."""


@dataclass(eq=False)
class Axis:
    """`at` is the place of an axis that a view selects; nothing behind the view runs over the axis."""

    size: Size
    parts: tuple[Axis, ...] | None = None
    at: int | None = None

    def __repr__(self) -> str:
        return f"<{id(self) % 9973}:{self.size}>"


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for all of them; it sets no guard."""
    return condition if isinstance(condition, bool) else statically_known_true(condition)


def same_shape(a: Value, b: Value) -> bool:
    return len(a.shape) == len(b.shape) and all(known(m == n) for m, n in zip(a.shape, b.shape, strict=True))


def leaves(axes: Iterable[Axis]) -> Dim:
    """Axes with every split one replaced by its parts."""
    found: list[Axis] = []
    for axis in axes:
        found += [axis] if axis.parts is None else leaves(axis.parts)
    return tuple(found)


def resolve(layout: Layout) -> Layout:
    return tuple(leaves(dim) for dim in layout)


def all_axes(layout: Layout) -> Dim:
    return tuple(axis for dim in resolve(layout) for axis in dim)


def free_axes(layout: Layout) -> Dim:
    """The axes of a layout without those of which one place is selected."""
    return tuple(axis for axis in all_axes(layout) if axis.at is None)


@dataclass(frozen=True)
class Operand:
    """A tensor, and the axes that its dimensions run over."""

    value: Value
    layout: Layout

    @property
    def axes(self) -> Dim:
        return all_axes(self.layout)

    def over(self, dim: Dim) -> bool:
        """Whether it runs over one of some axes."""
        return not set(leaves(dim)).isdisjoint(self.axes)

    def side(self, value: Value) -> Operand:
        """An operand of the elementwise operation whose result this is."""
        return Operand(value, broadcast(self.layout, value.shape))


def fresh(shape: Sequence[Size]) -> Layout:
    """A layout with a new axis for each dimension that is not of size 1."""
    return tuple(() if known(size == 1) else (Axis(size),) for size in shape)


def product(axes: Iterable[Axis]) -> Size:
    size: Size = 1
    for axis in axes:
        size = size * axis.size
    return size


def split(axis: Axis, inner: Size) -> tuple[Axis, Axis]:
    """The two parts of an axis, the inner one of a given size."""
    if isinstance(inner, int) and isinstance(axis.size, int) and axis.size % inner:
        raise FailedMatch("a view splits a dimension in a way that does not divide it")
    if axis.at is not None and not (isinstance(inner, int) and isinstance(axis.size, int)):
        raise FailedMatch("a view splits a dimension of dynamic size of which one place is selected")
    outer = axis.size // inner
    offsets = (None, None) if axis.at is None else divmod(axis.at, inner)
    axis.parts = (Axis(outer, at=offsets[0]), Axis(inner, at=offsets[1]))
    return axis.parts


def reshape(layout: Layout, shape: Sequence[Size]) -> Layout:
    """The layout of the same elements in the same order in another shape."""
    left, right = 0, 0
    most = min(len(layout), len(shape))
    while right < most and known(product(layout[-1 - right]) == shape[-1 - right]):
        right += 1
    while left < most - right and known(product(layout[left]) == shape[left]):
        left += 1
    inner = _regroup(layout[left : len(layout) - right], shape[left : len(shape) - right])
    return (*layout[:left], *inner, *layout[len(layout) - right :])


def _regroup(layout: Layout, shape: Sequence[Size]) -> Layout:
    stack = list(reversed(all_axes(layout)))
    result: list[Dim] = []
    for size in shape:
        dim: list[Axis] = []
        while not known(product(dim) == size):
            if not stack:
                raise FailedMatch("a view was not understood")
            axis = stack.pop()
            have = product(dim)
            total = have * axis.size
            if known(total == size) or _divides(total, size):
                dim.append(axis)
                continue
            if not (_divides(have, size) and known(axis.size % (size // have) == 0)):
                raise FailedMatch("a view mixes dimensions")
            need = size // have
            if known(axis.size // need == 1):  # equal, though the two expressions did not show it
                dim.append(axis)
                break
            outer, inner = split(axis, axis.size // need)
            dim.append(outer)
            stack.append(inner)
        if not dim and stack and known(stack[-1].size == 1):
            dim.append(stack.pop())
        result.append(tuple(dim))
    if stack:
        raise FailedMatch("a view was not understood")
    return tuple(result)


def _divides(small: Size, large: Size) -> bool:
    return (not isinstance(small, int) or small > 0) and known(large % small == 0)


def broadcast(layout: Layout, shape: Sequence[Size]) -> Layout:
    """The layout of an operand of that shape in an elementwise operation whose result has `layout`."""
    tail = layout[len(layout) - len(shape) :]
    return tuple(
        () if known(size == 1) and not known(product(dim) == 1) else dim for dim, size in zip(tail, shape, strict=True)
    )


def before_reduction(value: Value, layout: Layout) -> tuple[Layout, list[int]]:
    """The layout of what a value with a layout reduces, whose reduced dimensions are new axes; and these dimensions."""
    source, given = value.args[0], value.args[1]
    dims = {d % len(source.shape) for d in (given if isinstance(given, (list, tuple)) else [given])}
    keepdim, rest = len(value.args) > 2 and bool(value.args[2]), iter(layout)
    full: list[Dim] = []
    for i, size in enumerate(source.shape):
        kept = next(rest, ()) if keepdim or i not in dims else ()
        full.append((Axis(size),) if i in dims else kept)
    return tuple(full), sorted(dims)
