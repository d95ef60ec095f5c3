"""Rules for logits: what an operator makes of scores in the form softcap(scale * q . k) + biases, with masks.

A rule gets a reader, a value and the value's layout. It gives None where no operand is scores, and raises FailedMatch
where the canonical form has no place for what the operator does: then the scores are taken as a whole (tier 2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import FailedMatch, Layout, all_axes, broadcast, leaves, resolve
from fx_passes.canonicalise.contraction import Operand, contraction, is_contraction
from fx_passes.canonicalise.forms import BIG, Bias, Factor, Mask, Scores, Walk, arguments
from fx_passes.canonicalise.operators import DIVISIONS, name
from fx_passes.canonicalise.qk_product import along_dimensions, has_rows, is_activations_product, is_softmax
from fx_passes.canonicalise.readings import choices, number_of
from fx_passes.canonicalise.views import chunk_of
from fx_passes.find.trace import Value

if TYPE_CHECKING:
    from fx_passes.canonicalise.reader import ScoresReader

aten = torch.ops.aten


def product(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``query @ key.mT``, in which the operand that runs over the keys is the key."""
    if not is_contraction(value):
        return None
    c = contraction(value, layout)
    if not is_activations_product(reader.walk.context, c, reader.keys):
        if any(reader.over_keys(o.layout) and reader.read(o.value, o.layout) for o in (c.left, c.right)):
            raise FailedMatch("the scores are mixed across heads")
        return None
    if not has_rows(c, reader.keys, reader.shared.rows) or is_softmax(c.left.value) or is_softmax(c.right.value):
        return None
    mine = set(leaves(reader.keys))
    left, right = mine & set(all_axes(c.left.layout)), mine & set(all_axes(c.right.layout))
    if left and right:
        raise FailedMatch("both operands of the scores' product run over the keys")
    query, key = (c.right, c.left) if left else (c.left, c.right)
    extra = set(all_axes(key.layout)) - set(all_axes(query.layout)) - mine
    if extra and reader.contains_qk_product(key):
        raise FailedMatch("the scores are mixed across heads")
    return Scores(Operand(value, layout), query=query, key=key)


def cut(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``scores[:, h]`` or one of equal chunks: the axis has a place."""
    chunk = chunk_of(value, layout)
    if chunk is not None and not set(leaves(chunk[value.args[1]])) & set(leaves(reader.keys)):
        inner = reader.read(value.args[0], chunk)
        if inner is not None:
            return inner
    return mixed(reader, value, layout, "a part of the scores is cut out" if chunk is not None else "")


def negated(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    inner = reader.read(value.args[0], layout)
    return inner if inner is None or inner.why else _times(inner, -1.0)


def added(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``scores + bias``: a bias, or nothing where it is the same for all keys."""
    a, b = value.args[0], value.args[1]
    alpha = float(value.kwargs.get("alpha", 1)) * (-1.0 if value.op is aten.sub.Tensor else 1.0)
    first, second = reader.operand(a, layout), reader.operand(b, layout)
    if not isinstance(b, Value):
        if first is not None and not reader.shifts:
            raise FailedMatch("a number is added to scores that have a sink")
        return first
    readings = [(first, 1.0, b, alpha), (second, alpha, a, 1.0)]
    why = ""
    for found, sign, side, scale in readings:
        if found is None or found.why:
            why = why or ("" if found is None else found.why)
            continue
        try:
            return _biased(reader, found, sign, Bias(side, broadcast(layout, side.shape), scale))
        except FailedMatch as reason:
            why = why or str(reason)
    if why:
        raise FailedMatch(why)
    return None


def _biased(reader: ScoresReader, found: Scores, sign: float, bias: Bias) -> Scores:
    found = found if sign == 1.0 else _times(found, sign)
    if reader.shifts and not reader.over_keys(bias.layout):
        return found
    if found.zeroed:
        masked = _mask_of_zeroed(reader.walk, found, bias)
        if masked is None:
            raise FailedMatch("the scores are multiplied by zeros")
        return masked
    return replace(found, biases=[*found.biases, bias])


def multiplied(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``scores * number`` changes the scale, ``scores * tensor`` has a factor."""
    a, b = value.args[0], value.args[1]
    divides = value.op in DIVISIONS
    if reader.operand(a, layout) is None:
        if reader.operand(b, layout) is None:
            return None
        if divides:
            raise FailedMatch("the scores divide")
        a, b = b, a
    if value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the scores are rounded")
    side = broadcast(layout, b.shape) if isinstance(b, Value) else ()
    # Behind a factor over the keys, what was the same for all keys is so no more.
    inner = (reader.exact() if reader.over_keys(side) else reader).operand(a, layout)
    if inner is None or inner.why:
        return inner
    number = number_of(reader.walk, b, buffers=False)
    if number is not None:
        return _times(inner, 1.0 / number if divides and number else number)
    if not isinstance(b, Value):
        return with_factor(inner, Factor.number(b, -1 if divides else 1))
    if reader.operand(b, layout) is not None:
        raise FailedMatch("two products of activations are multiplied with one another")
    factor = Factor(b, side, -1 if divides else 1)
    if _zeroing(reader.walk, factor) and not (inner.masks or inner.biases or inner.softcap or inner.zeroed):
        return replace(inner, zeroed=[factor])
    return with_factor(inner, factor)


def capped(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``tanh(scores)`` is a softcap of 1; a factor behind it makes it another one."""
    inner = reader.exact().read(value.args[0], layout)
    if inner is None or inner.why:
        return inner
    if inner.softcap or inner.biases or inner.masks:
        raise FailedMatch("the scores go through tanh after a bias or a mask")
    return replace(inner, softcap=1.0)


def filled(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``scores.masked_fill(hidden, -inf)``, ``where(seen, scores, -inf)``: a mask."""
    if not any(reader.operand(x, layout) is not None for x in arguments(value)):
        return None
    for kept, fill, condition, keep in choices(reader.walk, value):
        inner = reader.operand(kept, layout)
        if inner is None:
            continue
        if fill > BIG:
            raise FailedMatch(f"masked scores get the value {fill:g}, which is not large enough to be a mask")
        if inner.why:
            return inner
        mask = Mask(condition, broadcast(layout, condition.shape), keep, fill, over=len(inner.biases))
        return replace(inner, masks=[*inner.masks, mask])
    raise FailedMatch("the scores are masked in a way that was not understood")


def written(reader: ScoresReader, value: Value, layout: Layout) -> Scores | None:
    """``scores[..., 1:] = other``: scores of which no more is known."""
    if reader.read(value.args[0], layout) is None:
        return None
    raise FailedMatch(f"the scores go through {name(value)}")


def mixed(reader: ScoresReader, value: Value, layout: Layout, why: str = "") -> Scores | None:
    """What reads, cuts or joins scores along some dimensions: scores of which no more is known."""
    if along_dimensions(reader, value, layout):
        raise FailedMatch(why or f"the scores go through {name(value)}")
    return None


def _times(s: Scores, number: float) -> Scores:
    """Scores times a number. A capped score keeps its slope inside and its height outside."""
    if number == 0 or not math.isfinite(number):
        raise FailedMatch("the scores are multiplied by zero or by a number that is not finite")
    masks = [m if math.isinf(m.fill) else replace(m, fill=m.fill * number) for m in s.masks]
    if number < 0 and any(m.fill < 0 for m in s.masks):
        raise FailedMatch("masked scores are multiplied by a negative number")
    biases = [replace(b, scale=b.scale * number) for b in s.biases]
    if s.zeroed and number < 0:
        raise FailedMatch("the scores are multiplied by zeros")
    if s.softcap:
        # softcap * tanh(x / softcap) with another height h: h * tanh((x * h / softcap) / h).
        return replace(s, softcap=s.softcap * number, scale=s.scale * number, biases=biases, masks=masks)
    return replace(s, scale=s.scale * number, biases=biases, masks=masks)


def _zeroing(walk: Walk, factor: Factor) -> bool:
    constant = walk.constant(factor.value) if factor.power == 1 and isinstance(factor.value.fake, Tensor) else None
    return constant is not None and bool(((constant == 0) | (constant == 1)).all()) and not bool(constant.all())


def _mask_of_zeroed(walk: Walk, found: Scores, bias: Bias) -> Scores | None:
    """``scores * ones + fill * (1 - ones)``, as in GPT-1, is a mask; None where it is not that."""
    if len(found.zeroed) != 1 or found.masks or found.biases:
        return None
    zeroed = found.zeroed[0]
    ones, added = walk.constant(zeroed.value), walk.constant(bias.value)
    if ones is None or added is None or ones.shape != added.shape or resolve(zeroed.layout) != resolve(bias.layout):
        return None
    fills = added[ones == 0] * bias.scale
    if bool(added[ones == 1].any()) or bool((fills != fills[0]).any()) or float(fills[0]) > BIG:
        return None
    return replace(found, zeroed=[], masks=[Mask(zeroed.value, zeroed.layout, True, float(fills[0]))])


def with_factor(found: Scores, factor: Factor) -> Scores:
    if found.zeroed:
        raise FailedMatch("the scores are multiplied by zeros")
    if found.masks:
        raise FailedMatch("masked scores are multiplied by a tensor")
    if found.softcap:
        raise FailedMatch("capped scores are multiplied by a tensor")
    biases = [replace(x, factors=[*x.factors, factor]) for x in found.biases]
    return replace(found, factors=[*found.factors, factor], biases=biases)
