"""Host side of the sampler "tile": draw, lists by key tile, gradients. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fx_passes.ops import tile_rule
from fx_passes.ops.cuda.config import TileConfig, has_large_tiles, padded, tile_config
from fx_passes.ops.cuda.launch import dense_last, programs_for, shared_arguments
from fx_passes.ops.cuda.tile_backward import tile_columns, tile_dkdv, tile_dq, tile_sums
from fx_passes.ops.cuda.tile_probe import tile_probe, tile_rows
from fx_passes.ops.draws import STREAM_TILE, stream_word
from fx_passes.ops.problem import Gradients, Problem, Softmax
from fx_passes.ops.tile_ranges import ranges
from fx_passes.ops.tile_rule import KEYS, PROBED, ROWS

# Programs that take the rest of popular tiles, at most; each leaves partial sums of dK and dV.
_OVERFLOW = 512
_SHORTEST = 16  # row blocks of one program
_WALK = 64  # tiles over which the probe walks at a time


@dataclass(frozen=True)
class Tiles:
    """The tiles of keys that each block of rows keeps.

    Attributes:
        tile: int32 [B, H, blocks, capacity], ascending: (batch * G + key head) * tiles + tile; then `unused`.
        inverse: float32, like `tile`: 1 / q.
        counts: int32 [B, H, blocks].
        delta: float32 [B, H, M]: dO . O of every row, which the draw computes on the way.
        broken: int8 [B, H, blocks]: whether that of a row is not-a-number.
        unused: one above the largest name of a tile, B * G * tiles.
    """

    tile: Tensor
    inverse: Tensor
    counts: Tensor
    delta: Tensor
    broken: Tensor
    unused: int


def _sizes(problem: Problem) -> TileConfig:
    large = has_large_tiles(problem.query.device)
    return tile_config(problem.query.dtype, problem.query.shape[-1], problem.value.shape[-1], large)


def _arguments(problem: Problem, dropout_seed: Tensor, exact: bool = False) -> dict[str, Any]:
    """`launch.shared_arguments`, with float32's products on tensor cores, in three parts of TF32: about its accuracy.

    `exact` keeps them off tensor cores: an operand of 64 rows of 256 numbers in parts does not fit into shared memory.
    """
    shared = shared_arguments(problem, dropout_seed)
    if problem.query.dtype == torch.float32 and shared["PRECISION"] == "ieee" and not exact:
        shared["PRECISION"] = "tf32x3"
    return shared


def launch_tile_draw(
    problem: Problem, grad: Tensor, out: Tensor, softmax: Softmax, c: Tensor, seed: Tensor, capacity: int
) -> Tiles:
    """Draws the tiles. `capacity`: of `tile_rule.capacity_for`; a larger c on the device becomes the one that fits."""
    q, k, grad, out = (dense_last(x) for x in (problem.query, problem.key, grad, out))
    (b, h, m, _), (_, groups, n, _), e = q.shape, k.shape, out.shape[-1]
    blocks, per_head = tile_rule.count(m, ROWS), tile_rule.count(n, KEYS)
    sizes, new = _sizes(problem), q.new_empty
    tiles = Tiles(
        q.new_full((b, h, blocks, capacity), b * groups * per_head, dtype=torch.int32),
        new((b, h, blocks, capacity), dtype=torch.float32),
        new((b, h, blocks), dtype=torch.int32),
        new((b, h, m), dtype=torch.float32),
        new((b, h, blocks), dtype=torch.int8),
        b * groups * per_head,
    )
    probe = new((b, h, blocks, PROBED), dtype=torch.int32)
    tile_rows[(b * h * blocks,)](
        grad, *grad.stride()[:3], out, *out.stride()[:3], tiles.delta, probe, tiles.broken, h, m, blocks,
        E=e, BE=padded(e), BM=ROWS, PROBED=PROBED,
    )  # fmt: skip
    shared = _arguments(problem, seed)
    for name in ("E", "BE", "dropout_seed_ptr", "dropout_stream", "dropout_threshold", "dropout_inverse"):
        del shared[name]
    pack = sizes.probe_rows // PROBED
    packs = tile_rule.count(blocks * problem.group, pack)
    programs = programs_for(q.device, sizes.probe[0], packs * b * groups)
    width = per_head + sizes.probe_tiles
    low, high = ranges(problem)
    tile_probe[(programs,)](
        q, *q.stride()[:3], k, *k.stride()[:3], softmax.maximum, _total(softmax), probe,
        low_ptr=low, high_ptr=high,
        c_ptr=c, c_limit=tile_rule.c_limit(capacity, n), seed_ptr=seed,
        tile_stream=stream_word(problem.static.site, STREAM_TILE), floor=tile_rule.FLOOR,
        scratch_ptr=new(programs * pack * width, dtype=torch.float32), width=width,
        tile_ptr=tiles.tile, inverse_ptr=tiles.inverse, count_ptr=tiles.counts, capacity=capacity,
        tiles=per_head, key_planes=b * groups, heads=h, groups=groups, group=problem.group, m=m, n=n, blocks=blocks,
        packs=packs,
        programs=programs, ROWS=ROWS, BM=sizes.probe_rows, SUB=KEYS, BT=sizes.probe_tiles, PROBED=PROBED, TK=_WALK,
        num_warps=sizes.probe[0], num_stages=sizes.probe[1], maxnreg=sizes.probe_registers, **shared,
    )  # fmt: skip
    return tiles


def _total(softmax: Softmax) -> Tensor | None:
    """None where `maximum` is the logsumexp."""
    return softmax.total if softmax.total.numel() else None


def _order(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Numbers of the slots grouped by (key head, tile of keys), and where each group starts: int32 [tiles of all + 1].

    In a group they ascend: query heads, then blocks of rows. Unused slots come last.
    """
    grouped, order = tiles.tile.flatten().sort(stable=True)
    edges = torch.arange(tiles.unused + 1, device=order.device, dtype=torch.int32)
    return order, torch.searchsorted(grouped, edges, out_int32=order.numel() < 1 << 31)


def _split(start: Tensor, programs: int) -> tuple[Tensor, Tensor]:
    """How popular tiles are split: row blocks of one program at most, and the further programs of all tiles up to each.

    The first, int32 [1], is such that `programs` further ones are enough, known on the device alone.
    """
    chunk = start[-1:].div(programs, rounding_mode="floor").add_(1).clamp_(min=_SHORTEST)
    extra = start.diff().sub_(1).clamp_(min=0).floor_divide_(chunk)
    return chunk, extra.cumsum(0)


def launch_tile_backward(
    problem: Problem, grad: Tensor, softmax: Softmax, tiles: Tiles, dropout_seed: Tensor, bias_grad: bool
) -> tuple[Gradients, Tensor]:
    """Gradients of query, key, value and (if wanted) the bias; the number of pairs used, on the device."""
    q, k, v, grad = (dense_last(x) for x in (problem.query, problem.key, problem.value, grad))
    (b, h, m, d), (_, groups, n, e), sizes = q.shape, v.shape, _sizes(problem)
    blocks, per_head, capacity = tiles.counts.shape[2], tile_rule.count(n, KEYS), tiles.tile.shape[3]
    slots, new = tiles.tile.numel(), q.new_empty
    order, start = _order(tiles)
    overflow = min(_OVERFLOW, slots // _SHORTEST)
    chunk, over = _split(start, max(overflow, 1))
    partial = [new((2 * overflow, KEYS, padded(w)), dtype=torch.float32) for w in (d, e)]
    dquery, dkey, dvalue = new((b, h, m, d)), new((b, groups, n, d)), new((b, groups, n, e))
    used = new((b, h, blocks), dtype=torch.int32)
    broken = tiles.broken.view(b * groups, -1).amax(1)
    inputs = (
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], grad, *grad.stride()[:3],
        softmax.maximum, _total(softmax), tiles.delta,
    )  # fmt: skip
    shared = {"grad_scale": problem.static.scale, **_arguments(problem, dropout_seed, exact=max(d, e) > 128)}
    column = new((slots, KEYS), dtype=torch.float32) if bias_grad and _is_row(problem.attn_bias) else None
    bias = None
    if bias_grad and problem.attn_bias is not None and column is None:
        bias = torch.zeros((*problem.attn_bias.shape[:2], m, problem.attn_bias.shape[3]), device=q.device)
    for first, planes, part in _planes(problem, bias):
        tile_dq[(planes * blocks,)](
            *inputs,
            tile_ptr=tiles.tile, inverse_ptr=tiles.inverse, count_ptr=tiles.counts, capacity=capacity,
            dquery_ptr=dquery, used_ptr=used,
            dbias_ptr=part, dbias_h=None if part is None else part.stride(0) * (part.shape[0] > 1),
            dbias_m=None if part is None else part.stride(1),
            dbias_n=None if part is None or problem.attn_bias is None or problem.attn_bias.shape[3] == 1 else 1,
            dcolumn_ptr=column,
            first_plane=first, heads=h, groups=groups, group=problem.group, m=m, n=n, blocks=blocks, tiles=per_head,
            BM=ROWS, SUB=KEYS, BN=sizes.keys, WHOLE=n % KEYS == 0,
            num_warps=sizes.dq[0], num_stages=sizes.dq[1], **shared,
        )  # fmt: skip
    inverse = tiles.inverse.flatten()[order]
    number = torch.floor_divide(order, capacity, out=new(slots, dtype=torch.int32))
    split = {"start_ptr": start, "over_ptr": over, "chunk_ptr": chunk, "tiles": per_head, "total": tiles.unused}
    split |= {"partial_key_ptr": partial[0], "partial_value_ptr": partial[1], "overflow": overflow}
    split |= {"dkey_ptr": dkey, "dvalue_ptr": dvalue, "broken_ptr": broken}
    tile_dkdv[(overflow + tiles.unused,)](
        *inputs, number_ptr=number, inverse_ptr=inverse, heads=h, groups=groups, group=problem.group,
        m=m, n=n, blocks=blocks, ROWS=ROWS, BM=sizes.rows, BN=KEYS, WHOLE=m % ROWS == 0,
        num_warps=sizes.dkdv[0], num_stages=sizes.dkdv[1], **split, **shared,
    )  # fmt: skip
    if overflow:
        widths = {name: shared[name] for name in ("grad_scale", "D", "E", "BD", "BE")}
        tile_sums[(overflow,)](n=n, BN=KEYS, **split, **widths)
    if column is not None:
        bias = new((b, h, 1, n), dtype=torch.float32)
        tile_columns[(b * h * per_head,)](
            order, start, column, bias, capacity, h, groups, problem.group, n, blocks, per_head, BN=KEYS
        )
    if bias is not None and problem.attn_bias is not None:
        bias = bias.sum_to_size(problem.attn_bias.shape).to(problem.attn_bias.dtype)
    return Gradients(dquery, dkey, dvalue, bias, None), used.sum()


def _is_row(bias: Tensor | None) -> bool:
    """Whether a bias is the same in all rows: its gradient is then a sum over rows."""
    return bias is not None and bias.shape[2] == 1 and bias.shape[3] > 1


def _planes(problem: Problem, bias: Tensor | None) -> Iterator[tuple[int, int, Tensor | None]]:
    """Launches of `tile_dq`: first plane, planes, and the part of the bias's gradient that they add to.

    Planes that share a part follow one another in launches of their own: sums in a fixed order without atomics.
    """
    b, h = problem.query.shape[:2]
    if bias is None:
        yield 0, b * h, None
        return
    step = h if bias.shape[1] == h else 1
    for first in range(0, b * h, step):
        yield first, step, bias[first // h if bias.shape[0] > 1 else 0]
