"""Kernels of the sampler "tile": gradients from the kept tiles, dense products of 64 rows and 64 keys each.

`tile_dq` walks a row block's tiles, `tile_dkdv` a key tile's row blocks (of all query heads that share the key head).
They write every number once and sum in a fixed order: no atomics.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fx_passes.ops.cuda.scores import (
    LOG2E,
    ScoreMods,
    capped,
    dropout_tile,
    jit,
    load_rows,
    power,
    scores,
)


@triton.jit
def _softmax_rows(maximum_ptr, total_ptr, at, inside, NATURAL: tl.constexpr):
    """What is subtracted from the logits of rows, and a factor behind exp. A row that sees no key has weight 0."""
    top = tl.load(maximum_ptr + at, mask=inside, other=float("inf"))
    top = tl.where(top == float("-inf"), float("inf"), top)
    factor = 1.0
    if total_ptr is not None:
        factor = 1.0 / tl.load(total_ptr + at, mask=inside, other=1.0)
    return (top if NATURAL else top * LOG2E), factor


@triton.jit
def _seen_pairs(first, rows, m, n, left, right, diagonal, BN: tl.constexpr):
    """How many keys of the tile that starts at `first` each row has in the band: int32 [R]."""
    low = rows * 0 + first
    high = tl.minimum(low + BN, n)
    if right is not None:
        high = tl.minimum(high, rows + (diagonal + right + 1))
    if left is not None:
        low = tl.maximum(low, rows + (diagonal - left))
    return tl.where(rows < m, tl.maximum(high - low, 0), 0)


@jit
def tile_dq(
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
    tile_ptr, inverse_ptr, count_ptr, capacity,
    dquery_ptr, used_ptr, dbias_ptr, dbias_h, dbias_m, dbias_n, dcolumn_ptr,
    first_plane, heads, groups, group, m, n, blocks, tiles,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, SUB: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dQ of a block of rows, the number of pairs used, and what the bias's gradient is made of.

    `dbias_ptr` has what the tiles of this launch's planes add to the bias's gradient: a matrix [.., M, N], or with
    `dbias_n` None a number per row. `dcolumn_ptr` gets the sums over the rows of each kept tile, by its slot.
    BN: keys that are treated at a time, a divisor of SUB. WHOLE: n is a multiple of SUB.
    """
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    dropout_seed = tl.load(dropout_seed_ptr) if dropout_seed_ptr is not None else None
    rules = ScoreMods(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        dropout_seed, dropout_stream, dropout_threshold, dropout_inverse,
    )  # fmt: skip
    # Head after head, for what they read stays in the L2 cache; in a head long blocks first under a causal mask.
    program = tl.program_id(0)
    block = blocks - 1 - program % blocks
    plane = (first_plane + program // blocks).to(tl.int64)
    batch = plane // heads
    head = plane % heads
    named = ((batch * groups + head // group) * tiles).to(tl.int32)  # the first tile's name
    number = plane * blocks + block
    rows = block * BM + tl.arange(0, BM)
    inside = rows < m
    lane = tl.arange(0, BN)
    d = tl.arange(0, BD)
    query = load_rows(query_ptr + batch * q_b + head * q_h, rows, q_m, inside, D, BD, True)
    grad = load_rows(grad_ptr + batch * o_b + head * o_h, rows, o_m, inside, E, BE, True)
    at = plane * m + rows
    top, factor = _softmax_rows(maximum_ptr, total_ptr, at, inside, NATURAL)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    keys_of = key_ptr + batch * k_b + head // group * k_h
    values_of = value_ptr + batch * v_b + head // group * v_h
    acc = tl.zeros((BM, BD), tl.float32)
    used = tl.zeros((BM,), tl.int32)
    row_sum = tl.zeros((BM,), tl.float32)
    count = tl.load(count_ptr + number)
    tile_ptr += number * capacity
    inverse_ptr += number * capacity
    PARTS: tl.constexpr = SUB // BN
    for step in range(0, count * PARTS):
        slot = step // PARTS
        first = (tl.load(tile_ptr + slot) - named) * SUB + step % PARTS * BN
        inverse = tl.load(inverse_ptr + slot)
        keys = first + lane
        key = load_rows(keys_of, keys, k_n, keys < n, D, BD, not WHOLE)
        value = load_rows(values_of, keys, v_n, keys < n, E, BE, not WHOLE)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head, rows[:, None], keys[None, :], batch, m, n, rules, True)
        if NATURAL:
            weight = power(x - top[:, None], NATURAL) * (factor * inverse)[:, None]
        else:
            weight = power(x - (top - tl.log2(inverse))[:, None], NATURAL)
        dweight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if dropout_seed is not None:
            dweight *= dropout_tile(rules, plane, rows, first, BN)
        dlogit = weight * (dweight - delta[:, None])
        used += _seen_pairs(first, rows, m, n, left, right, diagonal, BN)
        if dbias_ptr is not None:
            if dbias_n is not None:
                to = dbias_ptr + (head * dbias_h + rows.to(tl.int64) * dbias_m)[:, None] + (keys * dbias_n)[None, :]
                there = inside[:, None] & (keys < n)[None, :]
                tl.store(to, tl.load(to, mask=there, other=0.0) + dlogit, mask=there)
            else:
                row_sum += tl.sum(dlogit, 1)
        if dcolumn_ptr is not None:
            to = dcolumn_ptr + (number * capacity + slot) * SUB + step % PARTS * BN
            tl.store(to + lane, tl.sum(dlogit, 0))
        if softcap is not None:
            ratio = capped(product * scale, softcap) / softcap
            dlogit *= 1.0 - ratio * ratio
        acc = tl.dot(dlogit.to(key.dtype), key, acc, input_precision=PRECISION)
    # A diverged row shows it, whatever was drawn.
    poison = tl.where((delta == delta) & (top == top), 0.0, float("nan"))
    tl.store(
        dquery_ptr + at[:, None] * D + d[None, :],
        (acc * grad_scale + poison[:, None]).to(dquery_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(used_ptr + number, tl.sum(used, 0))
    if dbias_ptr is not None and dbias_n is None:
        to = dbias_ptr + head * dbias_h + rows.to(tl.int64) * dbias_m
        tl.store(to, tl.load(to, mask=inside, other=0.0) + row_sum, mask=inside)


@triton.jit
def _split_of(program, over_ptr, total):
    """The tile that a further program works for: `over_ptr` says how many such programs all tiles up to each have."""
    low = program * 0
    high = low + total - 1
    while low < high:
        middle = (low + high) // 2
        if tl.load(over_ptr + middle) > program:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def _store_dkdv(
    dkey, dvalue, plane, keys, dkey_ptr, dvalue_ptr, broken_ptr, grad_scale, n,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    poison = tl.where(tl.load(broken_ptr + plane) != 0, float("nan"), 0.0)  # a diverged run shows it
    out = plane * n + keys
    has_key = keys < n
    tl.store(
        dkey_ptr + out[:, None] * D + d[None, :],
        (dkey * grad_scale + poison).to(dkey_ptr.dtype.element_ty),
        mask=has_key[:, None] & (d < D)[None, :],
    )
    tl.store(
        dvalue_ptr + out[:, None] * E + e[None, :],
        (dvalue + poison).to(dvalue_ptr.dtype.element_ty),
        mask=has_key[:, None] & (e < E)[None, :],
    )


@jit
def tile_dkdv(
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
    number_ptr, inverse_ptr, start_ptr, over_ptr, chunk_ptr,
    partial_key_ptr, partial_value_ptr, dkey_ptr, dvalue_ptr, broken_ptr,
    heads, groups, group, m, n, blocks, tiles, total, overflow,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys from the row blocks that keep it.

    Popular tiles are split into chunks: the first `overflow` programs take those behind the first one. All leave
    partial sums then, own ones at the tile's first further program, and `tile_sums` adds them up in their order.
    BM: rows that are treated at a time, a divisor of ROWS. WHOLE: m is a multiple of ROWS.
    """
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    dropout_seed = tl.load(dropout_seed_ptr) if dropout_seed_ptr is not None else None
    rules = ScoreMods(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        dropout_seed, dropout_stream, dropout_threshold, dropout_inverse,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    further = program < overflow
    chunk = tl.load(chunk_ptr)
    if further:
        if program >= tl.load(over_ptr + total - 1):
            return
        of = _split_of(program, over_ptr, total)
    else:
        # The first tiles of all heads first: they are kept by most rows. Then head after head, for what they read
        # stays in the L2 cache.
        of = program - overflow
        planes = total // tiles
        if of < planes:
            of = of * tiles
        else:
            of = (of - planes) // (tiles - 1) * tiles + 1 + (of - planes) % (tiles - 1)
    plane = of // tiles
    first = (of % tiles * BN).to(tl.int32)
    batch = plane // groups
    key_head = plane % groups
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    lane = tl.arange(0, BN)
    keys = first + lane
    has_key = keys < n
    key = load_rows(key_ptr + batch * k_b + key_head * k_h, keys, k_n, has_key, D, BD, True)
    value = load_rows(value_ptr + batch * v_b + key_head * v_h, keys, v_n, has_key, E, BE, True)
    dkey = tl.zeros((BN, BD), tl.float32)
    dvalue = tl.zeros((BN, BE), tl.float32)
    begin = tl.load(start_ptr + of)
    end = tl.load(start_ptr + of + 1)
    over_end = tl.load(over_ptr + of)
    over_begin = over_end - tl.maximum(end - begin - 1, 0) // chunk
    if further:
        begin += ((program - over_begin + 1) * chunk).to(begin.dtype)
    end = tl.minimum(end, begin + chunk)
    PARTS: tl.constexpr = ROWS // BM
    for step in range(begin * PARTS, end * PARTS):
        number = tl.load(number_ptr + step // PARTS)
        inverse = tl.load(inverse_ptr + step // PARTS)
        row_plane = (number // blocks).to(tl.int64)
        rows = number % blocks * ROWS + step % PARTS * BM + tl.arange(0, BM)
        inside = rows < m
        head = row_plane - batch * heads
        query = load_rows(query_ptr + batch * q_b + head * q_h, rows, q_m, inside, D, BD, not WHOLE)
        grad = load_rows(grad_ptr + batch * o_b + head * o_h, rows, o_m, inside, E, BE, not WHOLE)
        at = row_plane * m + rows
        top, factor = _softmax_rows(maximum_ptr, total_ptr, at, inside, NATURAL)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        product = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        x = scores(product, head, rows[None, :], keys[:, None], batch, m, n, rules, True)
        if NATURAL:
            weight = power(x - top[None, :], NATURAL) * (factor * inverse)[None, :]
        else:
            weight = power(x - (top - tl.log2(inverse))[None, :], NATURAL)
        dweight = tl.dot(value, tl.trans(grad), input_precision=PRECISION)
        spread = weight
        if dropout_seed is not None:
            drop = tl.trans(dropout_tile(rules, row_plane, rows, first, BN))
            spread = weight * drop
            dweight *= drop
        dvalue = tl.dot(spread.to(grad.dtype), grad, dvalue, input_precision=PRECISION)
        dlogit = weight * (dweight - delta[None, :])
        if softcap is not None:
            ratio = capped(product * scale, softcap) / softcap
            dlogit *= 1.0 - ratio * ratio
        dkey = tl.dot(dlogit.to(query.dtype), query, dkey, input_precision=PRECISION)
    if further or over_end > over_begin:
        slot = tl.where(further, overflow + program, over_begin)
        tl.store(partial_key_ptr + (slot * BN + lane)[:, None] * BD + d[None, :], dkey)
        tl.store(partial_value_ptr + (slot * BN + lane)[:, None] * BE + e[None, :], dvalue)
    else:
        _store_dkdv(
            dkey, dvalue, plane, keys, dkey_ptr, dvalue_ptr, broken_ptr, grad_scale, n, D, E, BD, BE
        )  # fmt: skip


@jit
def tile_sums(
    start_ptr, over_ptr, chunk_ptr, partial_key_ptr, partial_value_ptr, dkey_ptr, dvalue_ptr, broken_ptr, grad_scale,
    n, tiles, total, overflow,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK and dV of the popular tiles, from the partial sums of `tile_dkdv`."""
    program = tl.program_id(0).to(tl.int64)
    if program >= tl.load(over_ptr + total - 1):
        return
    of = _split_of(program, over_ptr, total)
    over_end = tl.load(over_ptr + of)
    pairs = tl.load(start_ptr + of + 1) - tl.load(start_ptr + of)
    over_begin = over_end - tl.maximum(pairs - 1, 0) // tl.load(chunk_ptr)
    if over_begin != program:  # one program per tile
        return
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    lane = tl.arange(0, BN)
    dkey = tl.load(partial_key_ptr + (program * BN + lane)[:, None] * BD + d[None, :])
    dvalue = tl.load(partial_value_ptr + (program * BN + lane)[:, None] * BE + e[None, :])
    for slot in range(overflow + over_begin, overflow + over_end):
        dkey += tl.load(partial_key_ptr + (slot * BN + lane)[:, None] * BD + d[None, :])
        dvalue += tl.load(partial_value_ptr + (slot * BN + lane)[:, None] * BE + e[None, :])
    keys = (of % tiles * BN).to(tl.int32) + lane
    _store_dkdv(
        dkey, dvalue, of // tiles, keys, dkey_ptr, dvalue_ptr, broken_ptr, grad_scale, n, D, E, BD, BE
    )  # fmt: skip


@jit
def tile_columns(
    order_ptr, start_ptr, dcolumn_ptr, dbias_ptr, capacity, heads, groups, group, n, blocks, tiles, BN: tl.constexpr
):  # fmt: skip
    """Sums of dS over rows, [B, H, N], of one query head and tile: the gradient of a bias that is the same in all rows.

    `order_ptr` has the slots grouped by (key head, tile); a head's own are picked out of its group's, in their order.
    """
    program = tl.program_id(0).to(tl.int64)
    plane = program // tiles
    tile = program % tiles
    key_plane = plane // heads * groups + plane % heads // group
    lane = tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for item in range(tl.load(start_ptr + key_plane * tiles + tile), tl.load(start_ptr + key_plane * tiles + tile + 1)):
        slot = tl.load(order_ptr + item)
        mine = slot // capacity // blocks == plane
        acc += tl.load(dcolumn_ptr + slot * BN + lane, mask=lane * 0 + mine.to(tl.int32) > 0, other=0.0)
    keys = tile * BN + lane
    tl.store(dbias_ptr + plane * n + keys, acc, mask=keys < n)
