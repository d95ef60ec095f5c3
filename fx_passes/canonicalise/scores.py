"""Rules for logits: what an operator makes of scores in the form softcap(scale * q . k) + biases, with masks.

A rule gets a reader and a value with its layout. It gives None where no operand is scores, and raises FailedMatch
where the canonical form has no place for what the operator does: then the scores are taken as a whole (tier 2).

    (tanh(q @ k.mT / 8 / 30) * 30 + bias).masked_fill(hidden, -inf)
    Scores(Product(q, k), scale=1 / 8, softcap=30, added=(Bias(bias), Mask(hidden, keep=False, fill=-inf)))
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import Axis, FailedMatch, Operand, before_reduction, known, leaves, resolve
from fx_passes.canonicalise.contraction import Contraction, contraction, is_contraction
from fx_passes.canonicalise.forms import BIG, Bias, Factor, Mask, Product, Scores, Walk, arguments, level
from fx_passes.canonicalise.operators import DIVISIONS, LARGEST, name
from fx_passes.canonicalise.readings import choices, number_of
from fx_passes.canonicalise.views import chunk_of, is_cast, is_view
from fx_passes.find.context import Level
from fx_passes.find.trace import Value

if TYPE_CHECKING:
    from fx_passes.canonicalise.reader import ScoresReader

aten = torch.ops.aten


def product(reader: ScoresReader, x: Operand) -> Scores | None:
    """``query @ key.mT``, in which the operand that runs over the keys is the key."""
    if not is_contraction(x.value):
        return None
    c = contraction(x)
    if not _is_activations_product(reader, c):
        if any(side.over(reader.keys) and reader.holds(side) for side in (c.left, c.right)):
            raise FailedMatch("the scores are mixed across heads")
        return None
    if not _has_rows(reader, c) or _is_softmax(c.left.value) or _is_softmax(c.right.value):
        return None
    if c.left.over(reader.keys) and c.right.over(reader.keys):
        raise FailedMatch("both operands of the scores' product run over the keys")
    query, key = (c.right, c.left) if c.left.over(reader.keys) else (c.left, c.right)
    if set(key.axes) - set(query.axes) - set(leaves(reader.keys)) and reader.contains_qk_product(key):
        raise FailedMatch("the scores are mixed across heads")
    return Scores(Product(query, key))


def _is_activations_product(reader: ScoresReader, c: Contraction) -> bool:
    """Whether a product is that of two activations and the keys are an axis of its result."""
    keys, context = reader.keys, reader.walk.context
    if not (c.left.over(keys) or c.right.over(keys)) or set(leaves(keys)) & set(leaves(c.summed)):
        return False
    return min(level(context, c.left.value), level(context, c.right.value)) >= Level.COMPUTED


def _has_rows(reader: ScoresReader, c: Contraction) -> bool:
    """Whether the rows of a product, if it has such, are among the axes that may be rows."""
    left, right = set(c.left.axes), set(c.right.axes)
    if c.left.over(reader.keys) and c.right.over(reader.keys):
        rows = left ^ right
    else:
        rows = right - left if c.left.over(reader.keys) else left - right
    return not rows or bool(rows & set(leaves(reader.shared.rows)))


def _is_softmax(value: Value) -> bool:
    """Whether an operand is a softmax as it is: its product is a weighted sum, not scores."""
    while is_view(value) or is_cast(value) or value.op is aten.dropout.default:
        value = value.args[0]
    return value.op is aten.softmax.int


def multiplied(reader: ScoresReader, x: Operand) -> Scores | None:
    """``scores * number`` changes the scale, ``scores * tensor`` has a factor."""
    a, b = x.value.args[:2]
    divides = x.value.op in DIVISIONS
    if reader.operand(x, a) is None:
        if reader.operand(x, b) is None:
            return None
        if divides:
            raise FailedMatch("the scores divide")
        a, b = b, a
    if x.value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the scores are rounded")
    power = -1 if divides else 1
    factor = Factor(b, x.side(b).layout, power) if isinstance(b, Value) else Factor.number(b, power)
    # Behind a factor over the keys, what was the same for all keys is so no more.
    found = (reader.exact() if factor.over(reader.keys) else reader).operand(x, a)
    if found is None:
        return None
    number = number_of(reader.walk, b, buffers=False)
    if number is not None:
        return _times(found, 1.0 / number if divides and number else number)
    if isinstance(b, Value) and reader.holds(x.side(b)):
        raise FailedMatch("two products of activations are multiplied with one another")
    if found.masks:
        raise FailedMatch("masked scores are multiplied by a tensor")
    if not found.is_linear:
        raise FailedMatch("capped scores are multiplied by a tensor")
    biases = tuple(replace(bias, factors=(*bias.factors, factor)) for bias in found.biases)
    return replace(found, factors=(*found.factors, factor), added=biases)


def _times(found: Scores, number: float) -> Scores:
    """Scores times a number. A capped score keeps its slope inside and its height outside:

    ``softcap * tanh(x / softcap)`` with another height h is ``h * tanh((x * h / softcap) / h)``.
    """
    if number == 0 or not math.isfinite(number):
        raise FailedMatch("the scores are multiplied by zero or by a number that is not finite")
    if number < 0 and found.masks:
        raise FailedMatch("masked scores are multiplied by a negative number")
    added = tuple(x.times(number) for x in found.added)
    return replace(found, scale=found.scale * number, softcap=found.softcap * number, added=added)


def negated(reader: ScoresReader, x: Operand) -> Scores | None:
    found = reader.operand(x, x.value.args[0])
    return found and _times(found, -1.0)


def capped(reader: ScoresReader, x: Operand) -> Scores | None:
    """``tanh(scores)`` is a softcap of 1; a factor behind it makes it another one."""
    found = reader.exact().operand(x, x.value.args[0])
    if found is not None and (found.added or not found.is_linear):
        raise FailedMatch("the scores go through tanh after a bias or a mask")
    return found and replace(found, softcap=1.0)


def added(reader: ScoresReader, x: Operand) -> Scores | None:
    """``scores + bias``: a bias, or nothing where it is the same for all keys."""
    a, b = x.value.args[:2]
    alpha = float(x.value.kwargs.get("alpha", 1)) * (-1.0 if x.value.op is aten.sub.Tensor else 1.0)
    if not isinstance(b, Value):
        found = reader.operand(x, a)
        if found is not None and not reader.shifts:
            raise FailedMatch("a number is added to the scores of the keys alone")
        return found
    failed: FailedMatch | None = None
    for side, sign, other, scale in ((a, 1.0, b, alpha), (b, alpha, a, 1.0)):
        try:
            found = reader.operand(x, side)
            if found is not None:
                found = found if sign == 1.0 else _times(found, sign)
                return _biased(reader, found, Bias(other, x.side(other).layout, scale))
        except FailedMatch as why:
            failed = failed or why
    if failed is not None:
        raise failed
    return None


def _biased(reader: ScoresReader, found: Scores, bias: Bias) -> Scores:
    if reader.shifts and not bias.over(reader.keys):
        return found
    for i, factor in enumerate(found.factors if not found.added else ()):
        fill = _fill_of(reader.walk, factor, bias)
        if fill is not None:
            mask = Mask(factor.value, factor.layout, True, fill)
            return replace(found, factors=(*found.factors[:i], *found.factors[i + 1 :]), added=(mask,))
    return replace(found, added=(*found.added, bias))


def _fill_of(walk: Walk, factor: Factor, bias: Bias) -> float | None:
    """The fill of the mask that ``scores * ones + fill * (1 - ones)`` is, as in GPT-1; None where it is none."""
    if factor.power != 1 or not isinstance(factor.value.fake, Tensor):
        return None
    ones, added = walk.constant(factor.value), walk.constant(bias.value)
    if ones is None or added is None or ones.shape != added.shape or resolve(factor.layout) != resolve(bias.layout):
        return None
    fills = added[ones == 0] * bias.scale
    if not bool(((ones == 0) | (ones == 1)).all()) or bool(added[ones == 1].any()) or not len(fills):
        return None
    return float(fills[0]) if bool((fills == fills[0]).all()) and float(fills[0]) <= BIG else None


def filled(reader: ScoresReader, x: Operand) -> Scores | None:
    """``scores.masked_fill(hidden, -inf)``, ``where(seen, scores, -inf)``: a mask."""
    if not reader.any_operand(x):
        return None
    for kept, mask in choices(reader.walk, x):
        found = reader.operand(x, kept)
        if found is None:
            continue
        if mask.fill > BIG:
            raise FailedMatch(f"masked scores get the value {mask.fill:g}, which is not large enough to be a mask")
        return replace(found, added=(*found.added, mask))
    raise FailedMatch("the scores are masked in a way that was not understood")


def cut(reader: ScoresReader, x: Operand) -> Scores | None:
    """``scores[:, h]`` or one of equal chunks: the axis has a place."""
    chunk = chunk_of(x.value, x.layout)
    if chunk is not None and not set(leaves(chunk[x.value.args[1]])) & set(leaves(reader.keys)):
        found = reader.read(Operand(x.value.args[0], chunk))
        if found is not None:
            return found
    if _along_dimensions(reader, x):
        raise FailedMatch(
            "a part of the scores is cut out" if chunk is not None else f"the scores go through {name(x.value)}"
        )
    return None


def written(reader: ScoresReader, x: Operand) -> None:
    """``scores[..., 1:] = other``: scores of which no more is known."""
    if reader.holds(Operand(x.value.args[0], x.layout)):
        raise FailedMatch(f"the scores go through {name(x.value)}")


def mixed(reader: ScoresReader, x: Operand) -> None:
    """What reads, cuts or joins scores along some dimensions: scores of which no more is known."""
    if _along_dimensions(reader, x):
        raise FailedMatch(f"the scores go through {name(x.value)}")


def _along_dimensions(reader: ScoresReader, x: Operand) -> bool:
    """Whether an operation along some dimensions has scores for an operand.

    What it takes from a dimension is another axis, which may be the keys'. The largest of scores along other axes are
    scores, too, as BiDAF's context looks at the query.
    """
    value, rows = x.value, reader.shared.rows
    if value.op in LARGEST:
        layout, dims = before_reduction(value, x.layout)
        rows.extend(axis for i in dims for axis in layout[i])
        return reader.holds(Operand(value.args[0], layout))
    mine = set(leaves(reader.keys))
    for source in arguments(value):
        if source.fake is None or len(source.shape) != len(x.layout) or not source.dtype.is_floating_point:
            continue
        new, over = [], reader.keys
        for i, (dim, a, b) in enumerate(zip(x.layout, source.shape, value.shape, strict=True)):
            channels = i == 1 and value.op is aten.convolution.default
            if known(a == b) and not channels:
                new.append(dim)
                continue
            if channels and set(leaves(dim)) & mine:
                return False
            axis = () if known(a == 1) else (Axis(a),)
            over = axis if set(leaves(dim)) & mine else over
            if not channels and set(leaves(dim)) & set(leaves(rows)):
                rows.extend(axis)
            new.append(axis)
        inner = reader if over is reader.keys else reader.with_keys(over)
        if inner.holds(Operand(source, tuple(new))):
            return True
    return False
