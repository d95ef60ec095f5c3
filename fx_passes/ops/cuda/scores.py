"""Device functions that every kernel shares: tiles of rows, logits with all that acts before softmax, dropout, and exp.

A logit is kept in units of log2(e) (exp is then one exp2 and one multiplication is folded into the scale), or, where a
bias or a softcap may make it huge, in natural units (`NATURAL`): a row of -1e9 must stay a row of equal logits.
"""

# Triton's language, not Python's types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Numbers of a launch that say nothing about memory's alignment: a kernel is not compiled anew because one of them is 1
# or a multiple of 16. (n stays: masked loads along keys are wide where it is a multiple of 16.)
COUNTS = [
    "batches", "heads", "groups", "group", "m", "blocks", "tiles", "scratch_tiles", "programs", "capacity", "chunk",
    "first_plane", "row_stream", "tile_stream", "dropout_stream", "dropout_threshold", "packs",
    "key_planes", "width", "total", "overflow",
]  # fmt: skip


def jit(kernel: Callable[..., Any]) -> Any:
    """A kernel that is launched. c of a site is an element of a vector: its alignment says nothing either."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(
        do_not_specialize=[name for name in COUNTS if name in names],
        do_not_specialize_on_alignment=[name for name in ("c_ptr",) if name in names],
    )(kernel)


class ScoreMods(NamedTuple):
    """What acts on the logits and the weights of a call. None switches a rule off when a kernel is compiled.

    `mask_m` is None where a mask is a function of the key alone. See `launch.shared_arguments`.
    """

    mask_ptr: Any
    mask_b: Any
    mask_h: Any
    mask_m: Any
    mask_n: Any
    bias_ptr: Any
    bias_b: Any
    bias_h: Any
    bias_m: Any
    bias_n: Any
    qid_ptr: Any
    qid_b: Any
    kid_ptr: Any
    kid_b: Any
    prefix_ptr: Any
    prefix_b: Any
    scale: Any
    softcap: Any
    left: Any
    right: Any
    diagonal: Any
    dropout_seed: Any
    dropout_stream: Any
    dropout_threshold: Any
    dropout_inverse: Any


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """exp of a difference of logits."""
    return tl.exp2(x * LOG2E) if NATURAL else tl.exp2(x)


@triton.jit
def capped(x, softcap):
    """``softcap * tanh(x / softcap)``; exp overflows to inf and the result is then exactly +-softcap."""
    return softcap * (1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E) / softcap)))


@triton.jit
def load_rows(ptr, rows, stride, there, W: tl.constexpr, BW: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix of width W and unit stride in it, [R, BW]: zero beyond W and, if `MASKED`, where not `there`."""
    lane = tl.arange(0, BW)
    at = ptr + rows.to(tl.int64)[:, None] * stride + lane[None, :]
    if MASKED:
        return tl.load(at, mask=there[:, None] & (lane < W)[None, :], other=0.0)
    elif BW == W:
        return tl.load(at)
    else:
        return tl.load(at, mask=(lane < W)[None, :], other=0.0)


@triton.jit
def bounds(
    first, n, left, right, diagonal, prefix, BM: tl.constexpr, BN: tl.constexpr, ANY: tl.constexpr
):  # fmt: skip
    """Keys [low, high) that a block of rows sees, and [a, b) inside, whose tiles need no mask; low, a, b at tiles."""
    low = 0
    high = n
    if right is not None:
        high = tl.minimum(n, tl.maximum(first + BM + diagonal + right, 0))
    if prefix is not None:
        high = tl.maximum(high, tl.minimum(n, prefix))
    elif left is not None:
        low = tl.maximum(first + diagonal - left, 0) // BN * BN
    a = low
    b = high // BN * BN
    if left is not None:
        a = tl.maximum(low, tl.cdiv(tl.maximum(first + BM - 1 + diagonal - left, 0), BN) * BN)
        a = tl.minimum(a, tl.maximum(low, tl.cdiv(high, BN) * BN))
    if right is not None:
        b = tl.minimum(b, tl.maximum(first + diagonal + right + 1, 0) // BN * BN)
    if ANY:
        b = a
    return low, a, tl.maximum(a, b), high


@triton.jit
def scores(product, heads, rows, keys, batch, m, n, rules, MASKED: tl.constexpr):
    """Logits of a tile in the unit of its kernel, -inf where masked.

    Args:
        product: query @ key^T, float32 [R, S], or its transpose.
        heads: int64, scalar or like `rows`.
        rows, keys: int32 [R, 1] and [1, S], or [1, R] and [S, 1] for the transpose. A row below 0 is none.
        batch: int64.
        MASKED: False where the caller knows that every row sees every key of the tile.
    """
    x = product * rules.scale
    if rules.softcap is not None:
        x = capped(x, rules.softcap)
    inside = (rows < m) & (rows >= 0) & (keys < n)
    if rules.bias_ptr is not None:
        row_at = batch * rules.bias_b + heads * rules.bias_h + rows.to(tl.int64) * rules.bias_m
        at = row_at + keys.to(tl.int64) * rules.bias_n
        x += tl.load(rules.bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        # One comparison for the end of the keys and the band's right side: the bound is a vector of the rows.
        last = tl.where(rows >= 0, n - 1, -1)
        if rules.right is not None:
            last = tl.minimum(last, rows + (rules.diagonal + rules.right))
        seen = keys <= last
        if rules.left is not None:
            seen = seen & (keys >= rows + (rules.diagonal - rules.left))
        if rules.prefix_ptr is not None:
            prefix = tl.load(rules.prefix_ptr + batch * rules.prefix_b)
            seen = (seen | (keys < prefix)) & (keys < n)
        if rules.qid_ptr is not None:
            query_id = tl.load(rules.qid_ptr + batch * rules.qid_b + rows, mask=(rows < m) & (rows >= 0), other=0)
            key_id = tl.load(rules.kid_ptr + batch * rules.kid_b + keys, mask=keys < n, other=0)
            seen = seen & (query_id == key_id)
        if rules.mask_ptr is not None:
            key_at = batch * rules.mask_b + keys.to(tl.int64) * rules.mask_n
            if rules.mask_m is None:
                seen = seen & (tl.load(rules.mask_ptr + key_at, mask=keys < n, other=0) != 0)
            else:
                at = heads * rules.mask_h + rows.to(tl.int64) * rules.mask_m + key_at
                seen = seen & (tl.load(rules.mask_ptr + at, mask=inside, other=0) != 0)
        x = tl.where(seen, x, float("-inf"))
    return x


@triton.jit
def row_word(seed, stream, head, rows):
    """The word of every row (or block of rows), as `draws.row_words`: uint32."""
    rows = rows.to(tl.uint32)
    zero = rows * 0
    word, _, _, _ = tl.philox(seed, zero, rows, zero + head.to(tl.uint32), zero + stream)
    return word


@triton.jit
def dropout_tile(rules, head, rows, first_key, BN: tl.constexpr):
    """Dropout factors [rows, BN] of the keys from `first_key` (a multiple of 4), as `draws.entry_words` has them."""
    groups = (first_key // 4 + tl.arange(0, BN // 4)).to(tl.uint32)[None, :]
    rows = rows.to(tl.uint32)[:, None]
    zero = rows * 0 + groups * 0
    w0, w1, w2, w3 = tl.philox(
        rules.dropout_seed, zero + groups, zero + rows, zero + head.to(tl.uint32), zero + rules.dropout_stream
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (rows.shape[0], BN))
    return tl.where(words >= rules.dropout_threshold.to(tl.uint32), rules.dropout_inverse, 0.0)


@triton.jit
def dropout_entries(rules, heads, rows, keys):
    """Dropout factors of single entries: heads, rows and keys of the same shape."""
    groups = (keys // 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        rules.dropout_seed, groups, rows.to(tl.uint32), heads.to(tl.uint32), groups * 0 + rules.dropout_stream
    )
    lane = keys % 4
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return tl.where(word >= rules.dropout_threshold.to(tl.uint32), rules.dropout_inverse, 0.0)
