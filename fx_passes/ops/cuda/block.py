"""Kernels of the block sampler: a block of 64 query rows draws its keys; the backward is dense on the gathered keys.

The rule, and the keys that it keeps for a seed, are those of `fx_passes.ops.tiled.block`.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fx_passes.ops.cuda.scores import (
    LOG2E,
    Rules,
    bounds,
    capped,
    dropout_entries,
    jit,
    load_rows,
    power,
    row_word,
    scores,
)

STEPS = tl.constexpr(8)  # of the fixed point for lambda, as in `tiled.block`


@triton.jit
def _norms(
    query, top, total, inside, low, high, key_ptr, k_n, scratch, batch, head, rows, m, n, rules,
    D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The root of the sum of W^2 over the block's rows, of the keys [low, high), into the scratch."""
    for start in range(low, high, BN):
        keys = start + tl.arange(0, BN)
        key = load_rows(key_ptr, keys, k_n, keys < n, D, BD, MASKED)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head, rows, keys, batch, m, n, rules, MASKED)
        weight = power(x - top[:, None], NATURAL) / total[:, None]
        # Not-a-number fails the comparison: broken inputs must not become keys outside of the lists.
        weight = tl.where(inside[:, None] & (weight <= 1.01), weight, 0.0)
        tl.store(scratch + keys, tl.sqrt(tl.sum(weight * weight, 0)))


@triton.jit
def _factor(scratch, low, high, c, TK: tl.constexpr):
    """lambda and whether the block has at most c keys at all; see `tiled.block.probabilities`. Both [1]."""
    lane = tl.arange(0, TK)
    sums = tl.zeros((TK,), tl.float64)
    some = tl.zeros((TK,), tl.int32)
    for start in range(low, high, TK):
        norm = tl.load(scratch + start + lane, mask=start + lane < high, other=0.0)
        sums += norm.to(tl.float64)
        some += (norm > 0).to(tl.int32)
    zero = tl.zeros((1,), tl.float64)
    factor = zero + c / tl.maximum(tl.sum(sums, 0), 1e-300)
    for _ in range(STEPS):
        sums = tl.zeros((TK,), tl.float64)
        certain = tl.zeros((TK,), tl.int32)
        for start in range(low, high, TK):
            norm = tl.load(scratch + start + lane, mask=start + lane < high, other=0.0).to(tl.float64)
            sure = norm * factor >= 1
            sums += tl.where(sure, 0.0, norm)
            certain += sure.to(tl.int32)
        rest = zero + tl.sum(sums, 0)
        left = tl.maximum(c - tl.sum(certain, 0).to(tl.float64), 0.0)
        factor = tl.where(rest > 0, tl.maximum(factor, left / tl.maximum(rest, 1e-300)), factor)
    return factor, zero + tl.sum(some, 0).to(tl.float64) <= c


@jit
def block_select(
    query_ptr, q_b, q_h, q_m,
    key_ptr, k_b, k_h, k_n,
    maximum_ptr, total_ptr,
    mask_ptr, mask_b, mask_h, mask_m, mask_n,
    bias_ptr, bias_b, bias_h, bias_m, bias_n,
    qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b,
    scale, softcap, left, right, diagonal,
    c_ptr, c_limit, seed_ptr, block_stream,
    scratch_ptr, found_ptr, inverse_ptr, count_ptr, capacity,
    batches, heads, group, m, n, scratch_keys, blocks, programs,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The keys of every block of rows in ascending order, 1 / q of each, and their number."""
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    ANY: tl.constexpr = prefix_ptr is not None or qid_ptr is not None or mask_ptr is not None
    rules = Rules(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        None, None, None, None,
    )  # fmt: skip
    program = tl.program_id(0)
    scratch = scratch_ptr + program.to(tl.int64) * scratch_keys
    lane = tl.arange(0, TK)
    c = tl.minimum(tl.load(c_ptr), c_limit).to(tl.float64)
    for work in range(program, batches * heads * blocks, programs):
        plane = (work // blocks).to(tl.int64)
        block = blocks - 1 - work % blocks  # long rows first under a causal mask
        batch = plane // heads
        head = plane % heads
        rows = block * BM + tl.arange(0, BM)
        inside = rows < m
        query = load_rows(query_ptr + batch * q_b + head * q_h, rows, q_m, inside, D, BD, True)
        top = tl.load(maximum_ptr + plane * m + rows, mask=inside, other=0.0)
        total = tl.load(total_ptr + plane * m + rows, mask=inside, other=1.0)
        top = top if NATURAL else top * LOG2E
        prefix = tl.load(prefix_ptr + batch * prefix_b).to(tl.int32) if prefix_ptr is not None else None
        low, a, b, high = bounds(block * BM, n, left, right, diagonal, prefix, BM, BN, ANY)
        keys_of = key_ptr + batch * k_b + head // group * k_h
        tl.debug_barrier()  # the block before is done with the scratch
        for part in tl.static_range(3):
            if part == 2 or (part == 1 and not ANY) or (part == 0 and left is not None):
                start = low if part == 0 else (a if part == 1 else b)
                stop = a if part == 0 else (b if part == 1 else high)
                _norms(
                    query, top, total, inside, start, stop, keys_of, k_n, scratch,
                    batch, head, rows, m, n, rules, D, BN, BD, NATURAL, PRECISION, part != 1,
                )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read the norms
        end = low + tl.cdiv(tl.maximum(high - low, 0), BN) * BN
        factor, everything = _factor(scratch, low, end, c, TK)
        number = plane * blocks + block
        zero = tl.zeros((1,), tl.int32)
        carry = row_word(tl.load(seed_ptr), block_stream, plane, block + zero).to(tl.int64)
        for start in range(low, end, TK):
            norm = tl.load(scratch + start + lane, mask=start + lane < end, other=0.0).to(tl.float64)
            q = tl.where(everything, tl.where(norm > 0, 1.0, 0.0), tl.minimum(norm * factor, 1.0))
            units = (q * 4294967296.0).to(tl.int64)
            ends = tl.cumsum(units, 0) + carry
            slot = (ends - units) >> 32
            # The q of a block sum to c at most (`Lists.c_limit`): the bound guards memory, not the estimate.
            kept = ((ends >> 32) > slot) & (slot < capacity)
            at = number * capacity + slot
            tl.store(found_ptr + at, (start + lane).to(tl.int32), mask=kept)
            tl.store(inverse_ptr + at, (4294967296.0 / units.to(tl.float64)).to(tl.float32), mask=kept)
            carry = tl.maximum(carry, tl.max(ends, 0))
        tl.store(count_ptr + number + zero, tl.minimum(carry >> 32, capacity).to(tl.int32))


@jit
def block_backward(
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
    found_ptr, inverse_ptr, count_ptr, capacity,
    dquery_ptr, dkey_ptr, dvalue_ptr, dlogit_ptr, used_ptr,
    first, heads, group, m, n, blocks,
    D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of rows, from its keys.

    dK and dV are added to float32 tensors [B, G, N, width] by atomics or, with `PARTIAL`, left as rows
    [programs, capacity, width] of this launch, for a sum in a fixed order. dS [blocks, BM, capacity] if wanted.
    """
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    dropout_seed = tl.load(dropout_seed_ptr) if dropout_seed_ptr is not None else None
    rules = Rules(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        dropout_seed, dropout_stream, dropout_threshold, dropout_inverse,
    )  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    number = first + program
    plane = number // blocks
    batch = plane // heads
    head = plane % heads
    key_head = head // group
    lane = tl.arange(0, BM)
    rows = ((number % blocks) * BM).to(tl.int32) + lane
    inside = rows < m
    d = tl.arange(0, BD)
    e = tl.arange(0, BE)
    query = load_rows(query_ptr + batch * q_b + head * q_h, rows, q_m, inside, D, BD, True)
    grad = load_rows(grad_ptr + batch * o_b + head * o_h, rows, o_m, inside, E, BE, True)
    top = tl.load(maximum_ptr + plane * m + rows, mask=inside, other=0.0)
    total = tl.load(total_ptr + plane * m + rows, mask=inside, other=1.0)
    delta = tl.load(delta_ptr + plane * m + rows, mask=inside, other=0.0)
    top = top if NATURAL else top * LOG2E
    count = tl.load(count_ptr + number)
    dquery = tl.zeros((BM, BD), tl.float32)
    used = tl.zeros((BM,), tl.int32)
    for begin in range(0, count, BK):
        slots = begin + tl.arange(0, BK)
        valid = slots < count
        keys = tl.load(found_ptr + number * capacity + slots, mask=valid, other=0)
        inverse = tl.load(inverse_ptr + number * capacity + slots, mask=valid, other=0.0)
        key = load_rows(key_ptr + batch * k_b + key_head * k_h, keys, k_n, valid, D, BD, True)
        value = load_rows(value_ptr + batch * v_b + key_head * v_h, keys, v_n, valid, E, BE, True)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head, rows, keys, batch, m, n, rules, True)
        weight = power(x - top[:, None], NATURAL) / total[:, None] * inverse[None, :]
        weight = tl.where(inside[:, None] & valid[None, :], weight, 0.0)
        used += tl.sum((weight > 0).to(tl.int32), 1)
        spread = weight
        if dropout_seed is not None:
            none = tl.zeros((BM, BK), tl.int32)
            drop = dropout_entries(rules, plane.to(tl.int32) + none, rows[:, None] + none, keys[None, :] + none)
            spread *= drop
        # dV goes before dS is made: what is alive at the same time decides the registers.
        dvalue = tl.dot(tl.trans(spread.to(grad.dtype)), grad, input_precision=PRECISION)
        at = program * capacity + slots if PARTIAL else plane // group * n + keys
        value_at = dvalue_ptr + at[:, None] * E + e[None, :]
        value_mask = valid[:, None] & (e < E)[None, :]
        if PARTIAL:
            tl.store(value_at, dvalue, mask=value_mask)
        else:
            tl.atomic_add(value_at, dvalue, mask=value_mask, sem="relaxed")
        dweight = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        if dropout_seed is not None:
            dweight *= drop
        dlogit = weight * (dweight - delta[:, None])
        if dlogit_ptr is not None:
            dlogit_at = (number * BM + lane)[:, None] * capacity + slots[None, :]
            tl.store(dlogit_ptr + dlogit_at, dlogit, mask=valid[None, :])
        if softcap is not None:
            ratio = capped(product * scale, softcap) / softcap
            dlogit *= 1.0 - ratio * ratio
        dquery = tl.dot(dlogit.to(key.dtype), key, dquery, input_precision=PRECISION)
        dkey = tl.dot(tl.trans(dlogit.to(query.dtype)), query, input_precision=PRECISION) * grad_scale
        key_at = dkey_ptr + at[:, None] * D + d[None, :]
        key_mask = valid[:, None] & (d < D)[None, :]
        if PARTIAL:
            tl.store(key_at, dkey, mask=key_mask)
        else:
            tl.atomic_add(key_at, dkey, mask=key_mask, sem="relaxed")
    out = plane * m + rows
    tl.store(
        dquery_ptr + out[:, None] * D + d[None, :],
        (dquery * grad_scale).to(dquery_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(used_ptr + number, tl.sum(used, 0))
