"""Kernels of the sampler "tile" that draw: which rows of a block are probed, and which tiles of keys the block keeps.

The rule, and the tiles that it keeps for a seed, are those of `fx_passes.ops.tile_rule`.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from fx_passes.ops.cuda.scores import LOG2E, ScoreMods, jit, load_rows, power, row_word, scores


@jit
def tile_rows(
    grad_ptr, o_b, o_h, o_m,
    out_ptr, s_b, s_h, s_m,
    delta_ptr, probe_ptr, broken_ptr,
    heads, m, blocks,
    E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, PROBED: tl.constexpr,
):  # fmt: skip
    """dO . O of every row, whether a block has a diverged one, and its probed rows.

    These are every BM / (PROBED / 2)-th one, then those with the largest |dO|.
    """
    program = tl.program_id(0).to(tl.int64)
    plane = program // blocks
    block = program % blocks
    batch = plane // heads
    head = plane % heads
    lane = tl.arange(0, BM)
    rows = (block * BM).to(tl.int32) + lane
    inside = rows < m
    grad = load_rows(grad_ptr + batch * o_b + head * o_h, rows, o_m, inside, E, BE, True).to(tl.float32)
    out = load_rows(out_ptr + batch * s_b + head * s_h, rows, s_m, inside, E, BE, True).to(tl.float32)
    delta = tl.sum(grad * out, 1)
    tl.store(delta_ptr + plane * m + rows, delta, mask=inside)
    tl.store(broken_ptr + program, tl.max((delta != delta).to(tl.int8), 0))
    HALF: tl.constexpr = PROBED // 2
    STEP: tl.constexpr = BM // HALF
    even = lane % STEP == 0
    size = tl.sum(grad * grad, 1)
    size = tl.where(size >= 0, size, float("inf"))  # not-a-number: a diverged row is looked at
    size = tl.where(even, -2.0, tl.where(inside, size, -1.0))
    # The rank of a row among those that are not in the even half, the first one first where sizes are equal.
    before = (size[None, :] > size[:, None]) | ((size[None, :] == size[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    at = probe_ptr + program * PROBED
    tl.store(at + lane // STEP, tl.where(inside, rows, -1), mask=even)
    tl.store(at + HALF + rank, tl.where(inside, rows, -1), mask=(rank < HALF) & (size != -2.0))


@triton.jit
def _squares(
    query, top, inverse_total, start, stop, keys_of, k_n, scratch, width, batch, head, row, m, n, rules,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, SUB: tl.constexpr, BT: tl.constexpr, PROBED: tl.constexpr,
    NATURAL: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The sum over each block's probed rows of M^2, for the tiles [start, stop), into the scratch [blocks, width]."""
    PACK: tl.constexpr = BM // PROBED
    own = tl.arange(0, PACK)
    for first in range(start, stop, BT):
        keys = first * SUB + tl.arange(0, BT * SUB)
        key = load_rows(keys_of, keys, k_n, keys < n, D, BD, MASKED)
        product = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        x = scores(product, head[:, None], row[:, None], keys[None, :], batch, m, n, rules, MASKED)
        mass = tl.sum(tl.reshape(power(x - top[:, None], NATURAL), (BM, BT, SUB)), 2) * inverse_total[:, None]
        squares = tl.sum(tl.reshape(mass * mass, (PACK, PROBED, BT)), 1)
        tile = first + tl.arange(0, BT)
        tl.store(scratch + own[:, None] * width + tile[None, :], squares)


@jit
def tile_probe(
    query_ptr, q_b, q_h, q_m,
    key_ptr, k_b, k_h, k_n,
    maximum_ptr, total_ptr, probe_ptr,
    mask_ptr, mask_b, mask_h, mask_m, mask_n,
    bias_ptr, bias_b, bias_h, bias_m, bias_n,
    qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b,
    scale, softcap, left, right, diagonal,
    low_ptr, high_ptr,
    c_ptr, c_limit, seed_ptr, tile_stream, floor,
    scratch_ptr, width, tile_ptr, inverse_ptr, count_ptr, capacity, tiles,
    key_planes, heads, groups, group, m, n, blocks, packs, programs,
    D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, SUB: tl.constexpr, BT: tl.constexpr,
    PROBED: tl.constexpr, TK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of every block of rows in ascending order, 1 / q of each, and their number.

    A tile is stored as (key head) * tiles + tile, so that a sort groups all that keep it.

    A program probes BM / PROBED blocks at once: row blocks of the query heads that share a key head, heads first. It
    sweeps their tiles of SUB keys, BT at a time, then walks the points over what it found. Programs are persistent:
    the scratch [programs, BM / PROBED, width] does not grow with rows * keys.
    """
    NATURAL: tl.constexpr = bias_ptr is not None or softcap is not None
    # A mask that no place decides alone.
    ANY: tl.constexpr = prefix_ptr is not None or qid_ptr is not None or mask_ptr is not None or left is not None
    PACK: tl.constexpr = BM // PROBED
    rules = ScoreMods(
        mask_ptr, mask_b, mask_h, mask_m, mask_n, bias_ptr, bias_b, bias_h, bias_m, bias_n,
        qid_ptr, qid_b, kid_ptr, kid_b, prefix_ptr, prefix_b, scale, softcap, left, right, diagonal,
        None, None, None, None,
    )  # fmt: skip
    program = tl.program_id(0)
    scratch = scratch_ptr + program.to(tl.int64) * PACK * width
    c = tl.minimum(tl.load(c_ptr), c_limit).to(tl.float32)
    seed = tl.load(seed_ptr)
    lane = tl.arange(0, BM)
    own = tl.arange(0, PACK)
    for work in range(program, packs * key_planes, programs):
        pack = packs - 1 - work // key_planes  # long blocks first under a causal mask
        key_plane = (work % key_planes).to(tl.int64)
        batch = key_plane // groups
        key_head = key_plane % groups
        # One lane per probed row.
        virtual = pack * PACK + lane // PROBED
        head = key_head * group + virtual % group
        number = (batch * heads + head) * blocks + virtual // group
        row = tl.load(probe_ptr + number * PROBED + lane % PROBED, mask=virtual < blocks * group, other=-1)
        there = row >= 0
        query_at = batch * q_b + head * q_h + row.to(tl.int64) * q_m
        query = load_rows(query_ptr, query_at, 1, there, D, BD, True)
        plane_row = (batch * heads + head) * m + row
        top = tl.load(maximum_ptr + plane_row, mask=there, other=float("inf"))
        top = tl.where(top == float("-inf"), float("inf"), top)  # a row that sees no key
        top = top if NATURAL else top * LOG2E
        inverse_total = tl.full((BM,), 1.0, tl.float32)
        if total_ptr is not None:
            inverse_total = 1.0 / tl.load(total_ptr + plane_row, mask=there, other=1.0)
        # One lane per block: the tiles that it looks at.
        virtual = pack * PACK + own
        exists = virtual < blocks * group
        block = virtual // group
        plane = batch * heads + key_head * group + virtual % group
        first = block * ROWS
        probed = tl.maximum(tl.sum(tl.reshape(there.to(tl.float32), (PACK, PROBED)), 1), 1.0)
        low = first * 0
        high = first * 0 + n
        if right is not None:
            high = tl.minimum(high, tl.maximum(tl.minimum(first + ROWS, m) + (diagonal + right), 0))
        if prefix_ptr is not None:
            high = tl.maximum(high, tl.minimum(n, tl.load(prefix_ptr + batch * prefix_b).to(tl.int32)))
        elif left is not None:
            low = tl.maximum(first + (diagonal - left), 0) // SUB
        high = tl.cdiv(high, SUB)
        if low_ptr is not None:
            low = tl.maximum(low, tl.load(low_ptr + batch * blocks + block, mask=exists, other=0))
            high = tl.minimum(high, tl.load(high_ptr + batch * blocks + block, mask=exists, other=0))
        high = tl.where(exists, high, low)
        begin = tl.min(tl.where(high <= low, 2147483647, low), 0)
        end = tl.max(tl.where(high <= low, 0, high), 0)
        begin = tl.minimum(begin, end)
        # Before `middle` every probed row sees every key.
        middle = begin
        if not ANY:
            middle = n // SUB
            if right is not None:
                middle = tl.minimum(middle, tl.maximum((pack * PACK) // group * ROWS + diagonal + right + 1, 0) // SUB)
            middle = begin + tl.maximum(tl.minimum(middle, end) - begin, 0) // BT * BT
        keys_of = key_ptr + batch * k_b + key_head * k_h
        tl.debug_barrier()  # the work before is done with the scratch
        for part in tl.static_range(2):
            if part == 1 or not ANY:
                start = begin if part == 0 else middle
                stop = middle if part == 0 else end
                _squares(
                    query, top, inverse_total, start, stop, keys_of, k_n, scratch, width,
                    batch, head, row, m, n, rules, D, BD, BM, SUB, BT, PROBED, NATURAL, PRECISION, part == 1,
                )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read it
        share = c * floor / tl.maximum(high - low, 1).to(tl.float32)
        carry = row_word(seed, tile_stream, plane, block).to(tl.int64)
        at = (plane * blocks + block) * capacity
        for start in range(begin, end, TK):
            tile = start + tl.arange(0, TK)
            named = (key_plane * tiles).to(tl.int32) + tile
            sees = (tile[None, :] >= low[:, None]) & (tile[None, :] < high[:, None])
            squares = tl.load(scratch + own[:, None] * width + tile[None, :], mask=sees, other=0.0)
            q = c * tl.sqrt(squares / probed[:, None]) + share[:, None]
            # Not-a-number keeps the tile, so that a diverged run shows it.
            q = tl.where(q < 1.0, q, 1.0)
            units = tl.where(sees, tl.maximum((q * 4294967296.0).to(tl.int64), 1), 0)
            ends = tl.cumsum(units, 1) + carry[:, None]
            slot = (ends - units) >> 32
            kept = ((ends >> 32) > slot) & (slot < capacity)  # the bound guards memory: see `tile_rule.capacity_for`
            tl.store(tile_ptr + at[:, None] + slot, named[None, :] + tl.zeros((PACK, TK), tl.int32), mask=kept)
            tl.store(inverse_ptr + at[:, None] + slot, 4294967296.0 / units.to(tl.float32), mask=kept)
            carry = tl.max(ends, 1)
        kept = tl.minimum(carry >> 32, capacity).to(tl.int32)
        tl.store(count_ptr + plane * blocks + block, kept, mask=exists)
