"""Device functions that every kernel shares: logits with all that acts before softmax, dropout, and exp in one unit.

A logit is kept in units of log2(e) (exp is then one exp2 and one multiplication is folded into the scale), or, where a
bias or a softcap may make it huge, in natural units (`NATURAL`): a row of -1e9 must stay a row of equal logits.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """exp of a difference of logits."""
    return tl.exp2(x * LOG2E) if NATURAL else tl.exp2(x)


@triton.jit
def capped(x, softcap):
    """``softcap * tanh(x / softcap)``; exp overflows to inf and the result is then exactly +-softcap."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E) / softcap)))


@triton.jit
def scores(
    product,  # query @ key^T, float32 [R, S]
    heads,  # int64, scalar or [R]
    rows,  # int32 [R]
    keys,  # int32 [S]
    batch,  # int64
    m,
    n,
    mask_ptr,
    mask_b,
    mask_h,
    mask_m,
    mask_n,
    bias_ptr,
    bias_b,
    bias_h,
    bias_m,
    bias_n,
    qid_ptr,
    qid_b,
    kid_ptr,
    kid_b,
    prefix_ptr,
    prefix_b,
    scale,
    softcap,
    left,
    right,
    diagonal,
    SOFTCAP: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,  # 0: none, 1: a function of the key alone, 2: any
    IDS: tl.constexpr,
    PREFIX: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    MASKED: tl.constexpr,  # False where the caller knows that every row sees every key of the tile
):
    """Logits of a tile in the unit of its kernel, -inf where masked."""
    x = product * scale
    if SOFTCAP:
        x = capped(x, softcap)
    inside = (rows < m)[:, None] & (keys < n)[None, :]
    if BIAS:
        row_at = batch * bias_b + heads * bias_h + rows.to(tl.int64) * bias_m
        at = row_at[:, None] + (keys.to(tl.int64) * bias_n)[None, :]
        x += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        seen = (keys < n)[None, :] & (rows >= 0)[:, None]
        if RIGHT:
            seen = seen & (keys[None, :] <= (rows + (diagonal + right))[:, None])
        if LEFT:
            seen = seen & (keys[None, :] >= (rows + (diagonal - left))[:, None])
        if PREFIX:
            seen = (seen | (keys < tl.load(prefix_ptr + batch * prefix_b))[None, :]) & (keys < n)[None, :]
        if IDS:
            query_id = tl.load(qid_ptr + batch * qid_b + rows, mask=rows < m, other=0)
            key_id = tl.load(kid_ptr + batch * kid_b + keys, mask=keys < n, other=0)
            seen = seen & (query_id[:, None] == key_id[None, :])
        if MASK == 1:
            open_ = tl.load(mask_ptr + batch * mask_b + keys.to(tl.int64) * mask_n, mask=keys < n, other=0)
            seen = seen & (open_ != 0)[None, :]
        if MASK == 2:
            row_at = batch * mask_b + heads * mask_h + rows.to(tl.int64) * mask_m
            at = row_at[:, None] + (keys.to(tl.int64) * mask_n)[None, :]
            seen = seen & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        x = tl.where(seen, x, float("-inf"))
    return x


@triton.jit
def row_word(seed, stream, head, rows):
    """The systematic sampler's word of every row, as `draws.row_words`: uint32."""
    rows = rows.to(tl.uint32)
    zero = rows * 0
    word, _, _, _ = tl.philox(seed, zero, rows, zero + head.to(tl.uint32), zero + stream)
    return word


@triton.jit
def dropout_tile(seed, stream, head, rows, first_key, threshold, inverse, BN: tl.constexpr):
    """Dropout factors [rows, BN] of the keys from `first_key` (a multiple of 4), as `draws.entry_words` has them."""
    groups = (first_key // 4 + tl.arange(0, BN // 4)).to(tl.uint32)[None, :]
    rows = rows.to(tl.uint32)[:, None]
    zero = rows * 0 + groups * 0
    w0, w1, w2, w3 = tl.philox(seed, zero + groups, zero + rows, zero + head.to(tl.uint32), zero + stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], BN))
    return tl.where(words >= threshold.to(tl.uint32), inverse, 0.0)


@triton.jit
def dropout_entries(seed, stream, heads, rows, keys, threshold, inverse):
    """Dropout factors of single entries: one key per row."""
    groups = (keys // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, groups, rows.to(tl.uint32), heads.to(tl.uint32), groups * 0 + stream)
    lane = keys % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(word >= threshold.to(tl.uint32), inverse, 0.0)
