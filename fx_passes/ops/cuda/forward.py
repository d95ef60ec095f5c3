"""Kernel: flash forward that also keeps every (row, tile of keys)'s mass for a moment and draws from it.

Programs are persistent: each has one scratch of masses for the block of rows that it works on, so memory does not grow
with rows * keys. Without `OUT` it is the separate pass over Q K^T that serves `forward="library"` and lost lists.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fx_passes.ops.cuda.scores import (
    LN2,
    LOG2E,
    ScoreMods,
    bounds,
    dropout_tile,
    jit,
    load_rows,
    power,
    row_word,
    scores,
)
from fx_passes.ops.cuda.select import select


@triton.jit
def _sweep(
    acc, top, total, anchor, reset, query, low, high,
    key_ptr, k_n, value_ptr, v_n, scratch,
    batch, head, plane, rows, m, n, rules,
    D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SUB: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, OUT: tl.constexpr, SAMPLE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [low, high), `low` a multiple of BN."""
    for start in range(low, high, BN):
        keys = start + tl.arange(0, BN)
        key = load_rows(key_ptr, keys, k_n, keys < n, D, BD, MASKED)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head, rows[:, None], keys[None, :], batch, m, n, rules, MASKED)
        new = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        alpha = power(top - base, NATURAL)
        p = power(x - base[:, None], NATURAL)
        if SAMPLE:
            parts = tl.sum(tl.reshape(p, (BM, BN // SUB, SUB)), 2)
            # Masses are kept as log2, relative to an anchor that stays within 64 of the running maximum: exact to
            # about 2^-18 whatever the logits' size. Tiles from before the anchor moved weigh less than 2^-64.
            moved = new > anchor + (64.0 * LN2 if NATURAL else 64.0)
            anchor = tl.where(moved, new, anchor)
            reset = tl.where(moved, start // SUB, reset)
            lift = base - tl.where(anchor == float("-inf"), 0.0, anchor)
            if NATURAL:
                lift = lift * LOG2E
            tile = start // SUB + tl.arange(0, BN // SUB)
            tl.store(scratch + tile[None, :] * BM + tl.arange(0, BM)[:, None], tl.log2(parts) + lift[:, None])
            total = total * alpha + tl.sum(parts, 1)
        else:
            total = total * alpha + tl.sum(p, 1)
        if OUT:
            value = load_rows(value_ptr, keys, v_n, keys < n, E, BE, MASKED)
            if rules.dropout_seed is not None:
                p *= dropout_tile(rules, plane, rows, start, BN)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(value.dtype), value, acc, input_precision=PRECISION)
        top = new
    return acc, top, total, anchor, reset


@jit
def attention_forward(
    query_ptr, q_b, q_h, q_m,
    key_ptr, k_b, k_h, k_n,
    value_ptr, v_b, v_h, v_n,
    out_ptr, o_b, o_h, o_m,
    maximum_ptr, total_ptr,
    sinks_ptr,
    mask_ptr, mask_b, mask_h, mask_m, mask_n,
    bias_ptr, bias_b, bias_h, bias_m, bias_n,
    qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b,
    scale, softcap, left, right, diagonal,
    dropout_seed_ptr, dropout_stream, dropout_threshold, dropout_inverse,
    c_ptr, c_limit, seed_ptr, row_stream,
    scratch_ptr, tile_ptr, rank_ptr, place_ptr, units_ptr, capacity,
    batches, heads, group, m, n, tiles, scratch_tiles, blocks, programs,
    D: tl.constexpr, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, SUB: tl.constexpr, TC: tl.constexpr,
    PRECISION: tl.constexpr, OUT: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    """Out, maximum and total of every row; with `SAMPLE` also the lists of points."""
    program = tl.program_id(0)
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    # A mask that no place decides alone.
    ANY: tl.constexpr = prefix_ptr is not None or qid_ptr is not None or mask_ptr is not None
    dropout_seed = tl.load(dropout_seed_ptr) if dropout_seed_ptr is not None else None
    rules = ScoreMods(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        dropout_seed, dropout_stream, dropout_threshold, dropout_inverse,
    )  # fmt: skip
    e = tl.arange(0, BE)
    for work in range(program, batches * heads * blocks, programs):
        plane = (work // blocks).to(tl.int64)
        block = blocks - 1 - work % blocks  # long rows first under a causal mask
        batch = plane // heads
        head = plane % heads
        first = block * BM
        rows = first + tl.arange(0, BM)
        far = rows.to(tl.int64)
        inside = rows < m
        query = load_rows(query_ptr + batch * q_b + head * q_h, rows, q_m, inside, D, BD, True)
        prefix = tl.load(prefix_ptr + batch * prefix_b).to(tl.int32) if prefix_ptr is not None else None
        low, a, b, high = bounds(first, n, left, right, diagonal, prefix, BM, BN, ANY)
        top = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head).to(tl.float32)
            top = tl.zeros((BM,), tl.float32) + (sink if NATURAL else sink * LOG2E)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.zeros((BM, BE), tl.float32)
        anchor = tl.full((BM,), float("-inf"), tl.float32)
        reset = tl.zeros((BM,), tl.int32)
        keys_of = key_ptr + batch * k_b + head // group * k_h
        values_of = value_ptr + batch * v_b + head // group * v_h
        scratch = scratch_ptr
        if SAMPLE:
            scratch += program.to(tl.int64) * scratch_tiles * BM
        for part in tl.static_range(3):
            if part == 2 or (part == 1 and not ANY) or (part == 0 and left is not None):
                start = low if part == 0 else (a if part == 1 else b)
                stop = a if part == 0 else (b if part == 1 else high)
                acc, top, total, anchor, reset = _sweep(
                    acc, top, total, anchor, reset, query, start, stop,
                    keys_of, k_n, values_of, v_n, scratch, batch, head, plane, rows, m, n, rules,
                    D, E, BM, BN, BD, BE, SUB, NATURAL, PRECISION, OUT, SAMPLE, part != 1,
                )  # fmt: skip
        # The maximum that is stored is the one that others subtract, rounding included: total follows it.
        empty = total == 0.0  # not-a-number is not empty: a diverged run shows it
        kept = tl.where(empty, 0.0, top if NATURAL else top * LN2)
        shown = kept if NATURAL else kept * LOG2E
        scale_up = power(tl.where(empty, 0.0, top - shown), NATURAL)
        stored = tl.where(empty, 1.0, total * scale_up)
        at = plane * m + far
        tl.store(maximum_ptr + at, kept, mask=inside)
        tl.store(total_ptr + at, stored, mask=inside)
        total = tl.where(empty, 1.0, total)
        if OUT:
            acc = acc / total[:, None]
            tl.store(
                out_ptr + batch * o_b + head * o_h + far[:, None] * o_m + e[None, :],
                acc.to(out_ptr.dtype.element_ty),
                mask=inside[:, None] & (e < E)[None, :],
            )
        if SAMPLE:
            tl.debug_barrier()  # other threads of this program read the masses
            shift = tl.where(empty | (anchor == float("-inf")), 0.0, top - anchor)
            if NATURAL:
                shift = shift * LOG2E
            c = tl.minimum(tl.load(c_ptr), c_limit)
            select(
                scratch, shift, total, reset, row_word(tl.load(seed_ptr), row_stream, head + batch * heads, rows),
                inside, (c * 4294967296.0).to(tl.float32),
                low // SUB, tl.minimum(tiles, tl.cdiv(high, BN) * (BN // SUB)),
                capacity, at * capacity,
                tile_ptr, rank_ptr, place_ptr, units_ptr, BM, TC,
            )  # fmt: skip
            tl.debug_barrier()  # the next block overwrites them
