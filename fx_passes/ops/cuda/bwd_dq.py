"""Kernels over the rows' lists: the order of points by tile of keys, and the gradient of the queries."""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton.language as tl

from fx_passes.ops.cuda.scores import jit


@jit
def count_points(
    tile_ptr, counts_ptr, total, capacity, m, blocks, tiles, BM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Adds to the number of points of every block of rows in every tile: integers, whose order does not matter."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(tile_ptr + item, mask=item < total, other=-1)
    row_number = item // capacity
    at = row_number // m * blocks + row_number % m // BM
    tl.atomic_add(counts_ptr + at * tiles + (word & 0xFFFF), 1, mask=word >= 0, sem="relaxed")


@jit
def place_points(
    tile_ptr, rank_ptr, start_ptr, ends_ptr, order_ptr,
    total, capacity, m, group, blocks, tiles,
    BM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes every point's number to its place in the order of (key head, tile, query head, row, slot)."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(tile_ptr + item, mask=item < total, other=-1)
    live = word >= 0
    tile = word & 0xFFFF
    row_number = item // capacity
    plane = row_number // m  # batch * heads + head
    block = row_number % m // BM
    start = tl.load(start_ptr + plane // group * tiles + tile, mask=live, other=0)
    # `ends` counts up to each block of rows and with it, in the order of planes: those of a key head's group lie one
    # behind the other. What is before a block is the end of the one before.
    follows = live & (plane % group * blocks + block > 0)
    before = tl.load(ends_ptr + (plane * blocks + block - 1) * tiles + tile, mask=follows, other=0)
    rank = tl.load(rank_ptr + item, mask=live, other=0)
    tl.store(order_ptr + start + before + rank, item.to(order_ptr.dtype.element_ty), mask=live)


@jit
def attention_rows(
    key_ptr, k_b, k_h, k_n,
    found_ptr, dlogit_ptr, dquery_ptr, kept_ptr,
    grad_scale, capacity, total, m, heads, group,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dQ of a block of rows from their lists of (key, dS), and the number of entries they kept."""
    program = tl.program_id(0)
    row_number = program.to(tl.int64) * BR + tl.arange(0, BR)
    inside = row_number < total
    plane = row_number // m
    d = tl.arange(0, BD)
    base = plane // heads * k_b + plane % heads // group * k_h
    acc = tl.zeros((BR, BD), tl.float32)
    count = tl.zeros((BR,), tl.int32)
    for slot in range(0, capacity):
        item = row_number * capacity + slot
        found = tl.load(found_ptr + item, mask=inside, other=-1)
        live = found >= 0
        dlogit = tl.load(dlogit_ptr + item, mask=live, other=0.0)
        key = tl.load(
            key_ptr + (base + found.to(tl.int64) * k_n)[:, None] + d[None, :],
            mask=live[:, None] & (d < D)[None, :],
            other=0.0,
        )
        acc += dlogit[:, None] * key.to(tl.float32)
        count += live.to(tl.int32)
    tl.store(
        dquery_ptr + row_number[:, None] * D + d[None, :],
        (acc * grad_scale).to(dquery_ptr.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )
    tl.store(kept_ptr + program, tl.sum(count, 0))


@jit
def attention_delta(
    grad_ptr, o_b, o_h, o_m,
    out_ptr, s_b, s_h, s_m,
    delta_ptr, total, m, heads,
    E: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """dO . O of every row."""
    row_number = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    inside = row_number < total
    batch, head, row = row_number // m // heads, row_number // m % heads, row_number % m
    e = tl.arange(0, BE)
    mask = inside[:, None] & (e < E)[None, :]
    grad = tl.load(grad_ptr + (batch * o_b + head * o_h + row * o_m)[:, None] + e[None, :], mask=mask, other=0.0)
    out = tl.load(out_ptr + (batch * s_b + head * s_h + row * s_m)[:, None] + e[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + row_number, tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1), mask=inside)
