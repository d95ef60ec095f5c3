"""Kernel: finds the key of every point inside its tile, and owns the gradients of keys and values.

One program per tile of keys works on all points in it, from every row and every query head of its group: gathered
query rows, dense products on tensor cores, no atomics. Tiles with more than `chunk` points (sinks, local attention)
are split: a first launch (`OVERFLOW`) leaves partial sums, which the tile's own program adds up in a fixed order.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fx_passes.ops.cuda.scores import LOG2E, ScoreMods, capped, dropout_entries, jit, load_rows, power, scores

RESOLUTION = tl.constexpr(1 << 29)  # times 24 bits of a tile's length is exact in float64


@triton.jit
def _point(place, index, units, weights):
    """The key, in a tile of S keys, that holds a point; exact integers throughout.

    Weights become integer steps on [0, 2^29); b maps to ``g(b) = floor(b * units / 2^29)`` on the tile's line. A key
    owns the places [g(b_begin), g(b_end)) and the point is at ``index * 2^32 + place``.

    Returns the key's lane, q, and whether this is the first point of its row in that key, all [R].
    """
    sums = tl.sum(weights, 1)
    # A little too small, so that the steps never sum to more than the whole; the last key gets what is left.
    factor = tl.where(sums > 0, RESOLUTION * (1.0 - 3.814697265625e-06) / sums, 0.0)
    steps = (weights * factor[:, None]).to(tl.int32)
    ends = tl.cumsum(steps, 1)
    lanes = tl.arange(0, weights.shape[1])[None, :]
    steps = tl.where(lanes == weights.shape[1] - 1, RESOLUTION - ends + steps, steps)
    ends = tl.where(lanes == weights.shape[1] - 1, RESOLUTION, ends)

    length = units.to(tl.float64)
    x = (place.to(tl.uint32).to(tl.int64) + (index.to(tl.int64) << 32)).to(tl.float64)
    # The largest b with g(b) <= x, that is b * units < (x + 1) * 2^29; the quotient may be off by one.
    bound = (x + 1.0) * RESOLUTION
    b = tl.floor(bound / tl.maximum(length, 1.0))
    b = tl.where(b * length >= bound, b - 1.0, b)
    b = tl.where((b + 1.0) * length < bound, b + 1.0, b)
    y = tl.minimum(tl.maximum(b, 0.0), RESOLUTION - 1.0).to(tl.int32)
    begins = ends - steps
    hit = (begins <= y[:, None]) & (y[:, None] < ends)
    lane = tl.sum(tl.where(hit, lanes, 0), 1)
    low = tl.sum(tl.where(hit, begins, 0), 1)
    high = tl.sum(tl.where(hit, ends, 0), 1)
    low = tl.floor(low.to(tl.float64) * length / RESOLUTION)
    high = tl.floor(high.to(tl.float64) * length / RESOLUTION)
    q = tl.minimum((high - low) / 4294967296.0, 1.0)
    return lane, q.to(tl.float32), (index == 0) | (x - 4294967296.0 < low)


@jit
def attention_columns(
    query_ptr, q_b, q_h, q_m,
    key_ptr, k_b, k_h, k_n,
    value_ptr, v_b, v_h, v_n,
    grad_ptr, o_b, o_h, o_m,
    maximum_ptr, total_ptr, delta_ptr,
    mask_ptr, mask_b, mask_h, mask_m, mask_n,
    bias_ptr, bias_b, bias_h, bias_m, bias_n,
    qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b,
    scale, softcap, left, right, diagonal,
    dropout_seed_ptr, dropout_stream, dropout_threshold, dropout_inverse,
    grad_scale,
    tile_ptr, place_ptr, units_ptr, capacity,
    order_ptr, start_ptr, over_ptr, over_tile_ptr, chunk,
    partial_key_ptr, partial_value_ptr,
    dkey_ptr, dvalue_ptr,
    found_ptr, dlogit_ptr,
    heads, groups, group, m, n, tiles,
    D: tl.constexpr, E: tl.constexpr,
    BI: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SUB: tl.constexpr,
    PRECISION: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile's keys and values, and (key, dS * scale) of each point, in the place of the point."""
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    dropout_seed = tl.load(dropout_seed_ptr) if dropout_seed_ptr is not None else None
    rules = ScoreMods(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        dropout_seed, dropout_stream, dropout_threshold, dropout_inverse,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    number = program
    if OVERFLOW:
        number = tl.load(over_tile_ptr + program)
        if number < 0:
            return
    plane = number // tiles
    tile = number % tiles
    batch = plane // groups
    key_head = plane % groups
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    lane = tl.arange(0, SUB)
    keys = (tile * SUB + lane).to(tl.int32)
    has_key = keys < n
    key = load_rows(key_ptr + batch * k_b + key_head * k_h, keys, k_n, has_key, D, BD, True)
    value = load_rows(value_ptr + batch * v_b + key_head * v_h, keys, v_n, has_key, E, BE, True)
    dkey = tl.zeros((SUB, BD), tl.float32)
    dvalue = tl.zeros((SUB, BE), tl.float32)
    first = tl.load(start_ptr + number)
    stop = tl.load(start_ptr + number + 1)
    over_begin = tl.load(over_ptr + number)
    if OVERFLOW:
        first += (program - over_begin + 1) * chunk
    else:
        for slot in range(over_begin, tl.load(over_ptr + number + 1)):
            dkey += tl.load(partial_key_ptr + slot * SUB * BD + lane[:, None] * BD + d[None, :])
            dvalue += tl.load(partial_value_ptr + slot * SUB * BE + lane[:, None] * BE + e[None, :])
    stop = tl.minimum(stop, first + chunk)
    for begin in range(first, stop, BI):
        at = begin + tl.arange(0, BI)
        valid = at < stop
        # In the order's own type, int32 if it can be: a division of int64 takes a hundred instructions.
        item = tl.load(order_ptr + at, mask=valid, other=0)
        row_number = item // capacity
        plane_of_row = row_number // m
        rows = (row_number - plane_of_row * m).to(tl.int32)
        # Lanes without a point have row 0 of plane 0, whose distance to this batch is no head.
        head = tl.where(valid, plane_of_row - batch * heads, 0).to(tl.int64)
        query_at = batch * q_b + head * q_h + rows.to(tl.int64) * q_m
        query = load_rows(query_ptr, query_at, 1, valid, D, BD, True)
        grad_at = batch * o_b + head * o_h + rows.to(tl.int64) * o_m
        grad = load_rows(grad_ptr, grad_at, 1, valid, E, BE, True)
        top = tl.load(maximum_ptr + row_number, mask=valid, other=0.0)
        total = tl.load(total_ptr + row_number, mask=valid, other=1.0)
        delta = tl.load(delta_ptr + row_number, mask=valid, other=0.0)
        index = tl.load(tile_ptr + item, mask=valid, other=0) >> 16
        place = tl.load(place_ptr + item, mask=valid, other=0)
        units = tl.load(units_ptr + item, mask=valid, other=1.0)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head[:, None], rows[:, None], keys[None, :], batch, m, n, rules, True)
        shown = top if NATURAL else top * LOG2E
        weights = power(x - shown[:, None], NATURAL)  # times total; only ratios matter until one is chosen
        at_lane, q, is_first = _point(place, index, units, weights)
        hit = lane[None, :] == at_lane[:, None]
        weight = tl.sum(tl.where(hit, weights, 0.0), 1)
        kept = valid & is_first & (weight > 0)
        weight = tl.where(kept, weight / total / q, 0.0)
        chosen = at_lane + (tile * SUB).to(tl.int32)
        dweight = tl.sum(tl.where(hit, tl.dot(grad, tl.trans(value), input_precision=PRECISION), 0.0), 1)
        used = weight
        if dropout_seed is not None:
            drop = dropout_entries(rules, plane_of_row, rows, chosen)
            dweight *= drop
            used *= drop
        dlogit = weight * (dweight - delta)
        if softcap is not None:
            ratio = capped(tl.sum(tl.where(hit, product, 0.0), 1) * scale, softcap) / softcap
            dlogit *= 1.0 - ratio * ratio
        tl.store(found_ptr + item, tl.where(kept, chosen, -1), mask=valid)
        tl.store(dlogit_ptr + item, dlogit, mask=valid)
        spread = tl.where(hit, used[:, None], 0.0).to(grad.dtype)
        dvalue = tl.dot(tl.trans(spread), grad, dvalue, input_precision=PRECISION)
        spread = tl.where(hit, dlogit[:, None], 0.0).to(query.dtype)
        dkey = tl.dot(tl.trans(spread), query, dkey, input_precision=PRECISION)
    if OVERFLOW:
        tl.store(partial_key_ptr + program * SUB * BD + lane[:, None] * BD + d[None, :], dkey)
        tl.store(partial_value_ptr + program * SUB * BE + lane[:, None] * BE + e[None, :], dvalue)
    else:
        out = plane * n + keys
        tl.store(
            dkey_ptr + out[:, None] * D + d[None, :],
            (dkey * grad_scale).to(dkey_ptr.dtype.element_ty),
            mask=has_key[:, None] & (d < D)[None, :],
        )
        tl.store(
            dvalue_ptr + out[:, None] * E + e[None, :],
            dvalue.to(dvalue_ptr.dtype.element_ty),
            mask=has_key[:, None] & (e < E)[None, :],
        )
