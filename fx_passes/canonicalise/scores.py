"""From what softmax is taken of up to the product of query and key: scale, factors, softcap, biases, masks, sinks."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fx_passes.canonicalise.axes import Dim, FailedMatch, Layout, all_axes, broadcast, known, leaves, resolve
from fx_passes.canonicalise.contraction import Operand, contraction, is_contraction
from fx_passes.canonicalise.forms import BIG, Bias, Factor, Mask, Scores, Sink, Term, Walk
from fx_passes.canonicalise.probs import FILLS, PRODUCTS, SUMS, choices, name, number_of
from fx_passes.canonicalise.qk_product import contains_qk_product, is_activations_product
from fx_passes.canonicalise.views import before, chunk_of, is_cast, is_view
from fx_passes.find.trace import Value

aten = torch.ops.aten


def scores(walk: Walk, term: Term) -> Scores:
    """The canonical form of a term's logits. Where it cannot be had they are taken as a whole, with the reason.

    FailedMatch: they do not derive from a product of two activations, or columns were added in an unknown way.
    """
    value, layout, keys = term.source.value, term.source.layout, term.keys
    if not contains_qk_product(walk.context, value, layout, keys):
        raise FailedMatch("softmax is not taken of a product of two activations")
    sink = term.sink
    if term.extension is not None:
        mark = len(walk.visited)
        try:
            value, layout, sink = _columns(walk, value, layout, keys, *term.extension)
        except FailedMatch as reason:
            del walk.visited[mark:]
            return wide(term, str(reason))
        keys = term.extension[0]
    whole = Operand(value, layout)
    mark = len(walk.visited)
    try:
        found = _spine(walk, value, layout, keys, sink is None)
        if found.zeroed:
            found = _with_factor(replace(found, zeroed=[]), found.zeroed[0])
        _check_axes(found, keys)
        return replace(found, whole=whole, sink=sink)
    except FailedMatch as reason:
        del walk.visited[mark:]
        return Scores(whole, sink=sink, why=str(reason))


def wide(term: Term, why: str) -> Scores:
    """The logits of a term as a whole, with all columns that softmax runs over."""
    assert term.extension is not None
    keys, start = term.extension
    if not all(isinstance(axis.size, int) for axis in leaves((*keys, *term.keys))):
        raise FailedMatch(why)
    mine = set(leaves(term.keys))
    layout = tuple(keys if set(leaves(dim)) == mine else dim for dim in term.source.layout)
    return Scores(Operand(term.source.value, layout), wide=(term.keys, start), why=why)


def _columns(walk: Walk, value: Value, layout: Layout, wide: Dim, keys: Dim, start: int) -> tuple[Value, Layout, Sink]:
    """What stands in the columns that get a value, and the sink in the one that does not."""
    walk.visit(value)
    total, n = wide[0].size, math.prod(axis.size for axis in leaves(keys))
    dim = next(i for i, d in enumerate(layout) if set(leaves(d)) == set(leaves(wide)))
    narrow = (*layout[:dim], keys, *layout[dim + 1 :])
    if is_cast(value):
        return _columns(walk, value.args[0], layout, wide, keys, start)
    if value.op in SUMS and isinstance(value.args[1], Value):
        side = broadcast(layout, value.args[1].shape)
        if not set(leaves(wide)) & set(all_axes(side)):
            return _columns(walk, value.args[0], broadcast(layout, value.args[0].shape), wide, keys, start)
    if not known(total == n + 1):
        raise FailedMatch("softmax has more than one column without a value")
    if value.op is aten.constant_pad_nd.default:
        pads = list(value.args[1])
        number = float(value.args[2]) if len(value.args) > 2 else 0.0
        i = 2 * (len(layout) - 1 - dim)
        if i + 1 < len(pads) and sum(map(abs, pads)) == 1 and pads[i : i + 2] == ([0, 1] if start == 0 else [1, 0]):
            return value.args[0], narrow, Sink(None, number)
    if value.op is aten.cat.default and (value.args[1] if len(value.args) > 1 else 0) % len(layout) == dim:
        parts = value.args[0]
        order = parts if start == 0 else tuple(reversed(parts))
        if len(parts) == 2 and known(order[0].shape[dim] == n) and start in (0, 1):
            side = (*layout[:dim], (), *layout[dim + 1 :])
            return order[0], narrow, Sink(Operand(order[1], side))
    raise FailedMatch("columns are added to the scores in a way that was not understood")


def _check_axes(found: Scores, keys: Dim) -> None:
    mine = set(leaves(keys))
    for factor in found.factors:
        if mine & set(factor.axes) and set(factor.axes) - mine and found.query is not None and found.key is not None:
            only_query = set(all_axes(found.query.layout)) - set(all_axes(found.key.layout))
            if only_query & set(factor.axes):
                raise FailedMatch("the scores are multiplied by a tensor over query and key")


def _spine(walk: Walk, value: Value, layout: Layout, keys: Dim, shifts: bool) -> Scores:
    """The scores of a value that carries the product. `shifts`: a term without keys changes nothing."""
    walk.visit(value)
    if is_contraction(value):
        return _product(walk, value, layout, keys)
    if is_view(value):
        return _spine(walk, value.args[0], before(value, layout), keys, shifts)
    if is_cast(value):
        return _spine(walk, value.args[0], layout, keys, shifts)
    if value.op is aten.slice.Tensor and (chunk := chunk_of(value, layout)) is not None:
        if set(leaves(chunk[value.args[1]])) & set(leaves(keys)):
            raise FailedMatch("a part of the scores is cut out")
        return _spine(walk, value.args[0], chunk, keys, shifts)
    if value.op is aten.neg.default:
        return _times(_spine(walk, value.args[0], layout, keys, shifts), -1.0)
    if value.op in SUMS:
        return _sum(walk, value, layout, keys, shifts)
    if value.op in PRODUCTS:
        return _multiplied(walk, value, layout, keys, shifts)
    if value.op is aten.tanh.default:
        return _capped(_spine(walk, value.args[0], layout, keys, False))
    if value.op in FILLS:
        return _filled(walk, value, layout, keys, shifts)
    raise FailedMatch(f"the scores go through {name(value)}")


def _product(walk: Walk, value: Value, layout: Layout, keys: Dim) -> Scores:
    c = contraction(value, layout)
    if not is_activations_product(walk.context, c, keys):
        raise FailedMatch("the scores are mixed across heads")
    mine = set(leaves(keys))
    left, right = mine & set(all_axes(c.left.layout)), mine & set(all_axes(c.right.layout))
    if left and right:
        raise FailedMatch("both operands of the scores' product run over the keys")
    query, key = (c.right, c.left) if left else (c.left, c.right)
    extra = set(all_axes(key.layout)) - set(all_axes(query.layout)) - mine
    if extra and contains_qk_product(walk.context, key.value, key.layout, keys):
        raise FailedMatch("the scores are mixed across heads")
    return Scores(Operand(value, layout), product=c, query=query, key=key)


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


def _capped(s: Scores) -> Scores:
    """tanh(scores), which is a softcap of 1."""
    if s.softcap or s.biases or s.masks:
        raise FailedMatch("the scores go through tanh after a bias or a mask")
    return replace(s, softcap=1.0)


def _sum(walk: Walk, value: Value, layout: Layout, keys: Dim, shifts: bool) -> Scores:
    a, b = value.args[0], value.args[1]
    alpha = float(value.kwargs.get("alpha", 1)) * (-1.0 if value.op is aten.sub.Tensor else 1.0)
    if not isinstance(b, Value):
        if not shifts:
            raise FailedMatch("a number is added to scores that have a sink")
        return _spine(walk, a, layout, keys, shifts)
    la, lb = broadcast(layout, a.shape), broadcast(layout, b.shape)
    ca, cb = contains_qk_product(walk.context, a, la, keys), contains_qk_product(walk.context, b, lb, keys)
    if not ca and not cb:
        raise FailedMatch("no operand of a sum in the scores was understood")
    readings = []
    if ca:
        readings.append((a, la, 1.0, b, lb, alpha))
    if cb:
        readings.append((b, lb, alpha, a, la, 1.0))
    reason: FailedMatch | None = None
    for spine, inner, sign, side, outer, scale in readings:
        mark = len(walk.visited)
        try:
            found = _spine(walk, spine, inner, keys, shifts)
            found = found if sign == 1.0 else _times(found, sign)
            if shifts and not set(leaves(keys)) & set(all_axes(outer)):
                return found
            if found.zeroed:
                masked = _mask_of_zeroed(walk, found, Bias(side, outer, scale))
                if masked is None:
                    raise FailedMatch("the scores are multiplied by zeros")
                return masked
            return replace(found, biases=[*found.biases, Bias(side, outer, scale)])
        except FailedMatch as why:
            del walk.visited[mark:]
            reason = reason or why
    assert reason is not None
    raise reason


def _multiplied(walk: Walk, value: Value, layout: Layout, keys: Dim, shifts: bool) -> Scores:
    a, b = value.args[0], value.args[1]
    divides = value.op in (aten.div.Tensor, aten.div.Scalar)
    if value.kwargs.get("rounding_mode") is not None:
        raise FailedMatch("the scores are rounded")
    if not isinstance(a, Value) or (
        not divides
        and isinstance(b, Value)
        and not contains_qk_product(walk.context, a, broadcast(layout, a.shape), keys)
    ):
        a, b = b, a
    if not isinstance(a, Value) or not contains_qk_product(walk.context, a, broadcast(layout, a.shape), keys):
        raise FailedMatch("the scores divide")
    number = number_of(walk, b, buffers=False)
    if isinstance(b, Value) and set(leaves(keys)) & set(all_axes(broadcast(layout, b.shape))):
        shifts = False  # what is the same for all keys is so no more behind this
    found = _spine(walk, a, broadcast(layout, a.shape), keys, shifts)
    if number is not None:
        return _times(found, 1.0 / number if divides and number else number)
    if not isinstance(b, Value):
        return _with_factor(found, Factor.number(b, -1 if divides else 1))
    if contains_qk_product(walk.context, b, broadcast(layout, b.shape), keys):
        raise FailedMatch("two products of activations are multiplied with one another")
    factor = Factor(b, broadcast(layout, b.shape), -1 if divides else 1)
    if _zeroing(walk, factor) and not (found.masks or found.biases or found.softcap or found.zeroed):
        return replace(found, zeroed=[factor])
    return _with_factor(found, factor)


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


def _with_factor(found: Scores, factor: Factor) -> Scores:
    if found.zeroed:
        raise FailedMatch("the scores are multiplied by zeros")
    if found.masks:
        raise FailedMatch("masked scores are multiplied by a tensor")
    if found.softcap:
        raise FailedMatch("capped scores are multiplied by a tensor")
    biases = [replace(x, factors=[*x.factors, factor]) for x in found.biases]
    return replace(found, factors=[*found.factors, factor], biases=biases)


def _filled(walk: Walk, value: Value, layout: Layout, keys: Dim, shifts: bool) -> Scores:
    for kept, fill, condition, keep in choices(walk, value):
        inner = broadcast(layout, kept.shape)
        if not contains_qk_product(walk.context, kept, inner, keys):
            continue
        if fill > BIG:
            raise FailedMatch(f"masked scores get the value {fill:g}, which is not large enough to be a mask")
        found = _spine(walk, kept, inner, keys, shifts)
        mask = Mask(condition, broadcast(layout, condition.shape), keep, fill, over=len(found.biases))
        return replace(found, masks=[*found.masks, mask])
    raise FailedMatch("the scores are masked in a way that was not understood")
