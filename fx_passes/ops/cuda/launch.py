"""Host side of the kernels: the arguments that they share, and the launches. Nothing here waits for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fx_passes.ops.cuda.bwd_dkdv import attention_columns
from fx_passes.ops.cuda.bwd_dq import attention_delta, attention_rows, count_points, place_points
from fx_passes.ops.cuda.config import Config, config, has_large_tiles, padded
from fx_passes.ops.cuda.forward import attention_forward
from fx_passes.ops.cuda.lists import Lists, c_limit
from fx_passes.ops.draws import STREAM_DROPOUT, STREAM_ROW, stream_word
from fx_passes.ops.problem import Gradients, Problem, Softmax, empty_output

_LOG2E = 1.4426950408889634
_ROWS = 16  # rows of one program of the kernels in `rows`
_POINTS = 1024  # points of one program of `place_points`
# A tile with more points than this many average ones is split: partial sums then take at most an eighth of dK and dV.
_LONG = 8
_SHORTEST = 1024


def sizes_of(problem: Problem) -> Config:
    large = has_large_tiles(problem.query.device)
    return config(problem.query.dtype, problem.query.shape[-1], problem.value.shape[-1], large)


def dense_last(x: Tensor) -> Tensor:
    """With unit stride in the last dimension, which the kernels take for granted."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Strides of a mask or bias of four dimensions, 0 where it is broadcast."""
    return {f"{name}_{k}": 0 if x.shape[i] == 1 else x.stride(i) for i, k in enumerate("bhmn")}


def shared_arguments(problem: Problem, dropout_seed: Tensor) -> dict[str, Any]:
    """The arguments that make the kernels' `ScoreMods`, and head sizes; None where a rule is off."""
    s, mask, bias = problem.static, problem.attn_mask, problem.attn_bias
    none = dict.fromkeys(("b", "h", "m", "n"))
    arguments: dict[str, Any] = {
        "mask_ptr": None if mask is None else mask.view(torch.uint8),
        **({f"mask_{k}": v for k, v in none.items()} if mask is None else _strides("mask", mask)),
        "bias_ptr": bias,
        **({f"bias_{k}": v for k, v in none.items()} if bias is None else _strides("bias", bias)),
        "scale": s.scale if bias is not None or s.softcap else s.scale * _LOG2E,
        "softcap": float(s.softcap) if s.softcap else None,
        "left": s.left,
        "right": s.right,
        "diagonal": problem.diagonal,
        "dropout_seed_ptr": dropout_seed if s.dropout_p else None,
        "dropout_stream": stream_word(s.site, STREAM_DROPOUT) if s.dropout_p else None,
        "dropout_threshold": s.drop_below if s.dropout_p else None,
        "dropout_inverse": 1 / (1 - s.dropout_p) if s.dropout_p else None,
        "D": problem.query.shape[-1],
        "E": problem.value.shape[-1],
        "BD": padded(problem.query.shape[-1]),
        "BE": padded(problem.value.shape[-1]),
        # `allow_tf32` says the same, but raises where it was not `allow_tf32` that set it.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    }
    if mask is not None and all(mask.shape[i] == 1 or mask.stride(i) == 0 for i in (1, 2)):
        arguments |= {"mask_h": None, "mask_m": None}  # a function of the key alone
    for name, ids in (("qid", problem.query_ids), ("kid", problem.key_ids), ("prefix", problem.prefix)):
        ids = None if ids is None else ids.contiguous()
        arguments[f"{name}_ptr"] = ids
        arguments[f"{name}_b"] = None if ids is None else 0 if ids.shape[0] == 1 else ids.stride(0)
    return arguments


def programs_for(device: torch.device, warps: int, work: int) -> int:
    """Persistent programs: 16 warps per multiprocessor, which is what registers allow."""
    if device.type != "cuda":
        return min(work, 3)  # the interpreter: several blocks per program, so that a reused scratch is tested
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return min(work, count * max(1, 16 // warps))


def launch_forward(
    problem: Problem, c: Tensor, seed: Tensor, dropout_seed: Tensor, lists: Lists | None, with_out: bool
) -> tuple[Tensor | None, Softmax]:
    """Out (None without `with_out`) and softmax; fills `lists` if given."""
    q, k, v = (dense_last(x) for x in (problem.query, problem.key, problem.value))
    b, h, m, _ = q.shape
    n, sizes = k.shape[2], sizes_of(problem)
    out = empty_output(q, (b, h, m, v.shape[-1])) if with_out else None
    softmax = Softmax(*(q.new_empty((b, h, m), dtype=torch.float32) for _ in range(2)))
    blocks, tiles = -(-m // sizes.bm), -(-n // sizes.sub)
    programs = programs_for(q.device, sizes.forward[0], b * h * blocks)
    scratch_tiles = -(-n // sizes.bn) * (sizes.bn // sizes.sub)
    sample = lists is not None
    scratch = q.new_empty(programs * scratch_tiles * sizes.bm, dtype=torch.float32) if sample else None
    attention_forward[(programs,)](
        q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3],
        out, *(out.stride()[:3] if out is not None else (0, 0, 0)),
        softmax.maximum, softmax.total, None if problem.sinks is None else problem.sinks.contiguous(),
        c_ptr=c if sample else None, c_limit=c_limit(lists.capacity) if lists else 1.0,
        seed_ptr=seed if sample else None,
        row_stream=stream_word(problem.static.site, STREAM_ROW), scratch_ptr=scratch,
        tile_ptr=lists.tile if lists else None, rank_ptr=lists.rank if lists else None,
        place_ptr=lists.place if lists else None, units_ptr=lists.units if lists else None,
        capacity=lists.capacity if lists else 0,
        batches=b, heads=h, group=problem.group, m=m, n=n, tiles=tiles, scratch_tiles=scratch_tiles,
        blocks=blocks, programs=programs,
        BM=sizes.bm, BN=sizes.bn, SUB=sizes.sub, TC=sizes.tc,
        OUT=with_out, SAMPLE=sample, num_warps=sizes.forward[0], num_stages=sizes.forward[1],
        **shared_arguments(problem, dropout_seed),
    )  # fmt: skip
    return out, softmax


def _order(problem: Problem, lists: Lists) -> tuple[Tensor, Tensor]:
    """Numbers of the points grouped by (key head, tile), and where each group starts: [key heads * tiles + 1]."""
    (b, _, m, _), (_, groups, n, _), sizes = problem.query.shape, problem.key.shape, sizes_of(problem)
    blocks, tiles, slots = -(-m // sizes.bm), -(-n // sizes.sub), lists.tile.numel()
    counts = torch.zeros((b * groups, problem.group * blocks, tiles), dtype=torch.int32, device=lists.tile.device)
    count_points[(-(-slots // _POINTS),)](
        lists.tile, counts, slots, lists.capacity, m, blocks, tiles, BM=sizes.bm, BLOCK=_POINTS
    )
    ends = counts.cumsum_(1)  # in place: it is the one tensor here that grows with rows * keys
    start = torch.zeros(b * groups * tiles + 1, dtype=torch.int64, device=ends.device)
    torch.cumsum(ends[:, -1].flatten(), 0, out=start[1:])
    order = torch.empty(slots, dtype=torch.int32 if slots < 1 << 31 else torch.int64, device=ends.device)
    place_points[(-(-slots // _POINTS),)](
        lists.tile, lists.rank, start, ends, order, slots, lists.capacity, m, problem.group, blocks, tiles,
        BM=sizes.bm, BLOCK=_POINTS,
    )  # fmt: skip
    return order, start


def split_long(start: Tensor, slots: int, chunk: int) -> tuple[Tensor, Tensor]:
    """How tiles longer than a chunk are split: first overflow program of each tile, tile of each such program.

    Their number is bounded on the host, without a look at the device; a program without work has tile -1.
    """
    tiles = start.numel() - 1
    extra = (start.diff() - 1).clamp_(min=0) // chunk
    over = torch.zeros(tiles + 1, dtype=torch.int64, device=start.device)
    torch.cumsum(extra, 0, out=over[1:])
    programs = torch.arange(slots // chunk, device=start.device)
    tile = torch.searchsorted(over, programs, right=True) - 1
    return over, torch.where(tile < tiles, tile, -1)


def launch_delta(grad: Tensor, out: Tensor) -> Tensor:
    """dO . O of every row, float32 [B, H, M]; both have unit stride in the last dimension."""
    b, h, m, e = out.shape
    delta = out.new_empty((b, h, m), dtype=torch.float32)
    attention_delta[(-(-b * h * m // _ROWS),)](
        grad, *grad.stride()[:3], out, *out.stride()[:3], delta, b * h * m, m, h, E=e, BE=padded(e), BR=_ROWS
    )
    return delta


def launch_backward(
    problem: Problem, grad: Tensor, out: Tensor, softmax: Softmax, lists: Lists, dropout_seed: Tensor
) -> tuple[Gradients, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; the lists' keys (-1: none) and dS; the number of entries, on the device."""
    q, k, v, grad, out = (dense_last(x) for x in (problem.query, problem.key, problem.value, grad, out))
    b, h, m, d = q.shape
    (_, groups, n, e), sizes, rows = v.shape, sizes_of(problem), b * h * m
    new = q.new_empty
    delta = launch_delta(grad, out)
    blocks_of_rows = (-(-rows // _ROWS),)
    order, start = _order(problem, lists)
    tiles = -(-n // sizes.sub)
    slots = lists.tile.numel()
    chunk = -(-max(_SHORTEST, _LONG * slots // (start.numel() - 1)) // sizes.bi) * sizes.bi
    over, over_tile = split_long(start, slots, chunk)
    partial_key = new((len(over_tile), sizes.sub, padded(d)), dtype=torch.float32)
    partial_value = new((len(over_tile), sizes.sub, padded(e)), dtype=torch.float32)
    dquery, dkey, dvalue = new((b, h, m, d)), new((b, groups, n, d)), new((b, groups, n, e))
    found = torch.full_like(lists.tile, -1)
    dlogit = new(lists.tile.shape, dtype=torch.float32)
    shared = shared_arguments(problem, dropout_seed)
    for overflow, programs in ((True, len(over_tile)), (False, b * groups * tiles)):
        if programs:
            attention_columns[(programs,)](
                q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], grad, *grad.stride()[:3],
                softmax.maximum, softmax.total, delta,
                grad_scale=problem.static.scale,
                tile_ptr=lists.tile, place_ptr=lists.place, units_ptr=lists.units, capacity=lists.capacity,
                order_ptr=order, start_ptr=start, over_ptr=over, over_tile_ptr=over_tile, chunk=chunk,
                partial_key_ptr=partial_key, partial_value_ptr=partial_value,
                dkey_ptr=dkey, dvalue_ptr=dvalue, found_ptr=found, dlogit_ptr=dlogit,
                heads=h, groups=groups, group=problem.group, m=m, n=n, tiles=tiles,
                BI=sizes.bi, SUB=sizes.sub, OVERFLOW=overflow,
                num_warps=sizes.columns[0], num_stages=sizes.columns[1], **shared,
            )  # fmt: skip
    kept = new(blocks_of_rows, dtype=torch.int32)
    attention_rows[blocks_of_rows](
        k, *k.stride()[:3], found, dlogit, dquery, kept,
        problem.static.scale, lists.capacity, rows, m, h, problem.group, D=d, BD=padded(d), BR=_ROWS,
    )  # fmt: skip
    return Gradients(dquery, dkey, dvalue, None, None), found, dlogit, kept.sum()
