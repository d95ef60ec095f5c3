"""Host side of the block sampler's kernels. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.cuda.block import block_backward, block_select
from fx_passes.ops.cuda.launch import dense_last, launch_delta, programs_for, shared_arguments, sizes_of
from fx_passes.ops.cuda.lists import BlockLists, c_limit
from fx_passes.ops.draws import STREAM_BLOCK, stream_word
from fx_passes.ops.problem import Gradients, Problem, Softmax
from fx_passes.ops.tiled.block import ROWS

_KEYS = 1024  # keys that the selection treats at a time
_PARTIAL = 1 << 28  # bytes of the rows of dK and dV that wait for a sum in a fixed order


def launch_select(problem: Problem, softmax: Softmax, c: Tensor, seed: Tensor, lists: BlockLists) -> None:
    """Fills `lists`: a pass over Q K^T, whose scratch belongs to the running programs."""
    q, k = dense_last(problem.query), dense_last(problem.key)
    (b, h, m, _), n, sizes, blocks = q.shape, k.shape[2], sizes_of(problem), lists.counts.shape[2]
    programs = programs_for(q.device, sizes.block_select[0], b * h * blocks)
    scratch_keys = -(-n // sizes.bs) * sizes.bs
    shared = shared_arguments(problem, seed)
    for name in ("E", "BE", "dropout_seed_ptr", "dropout_stream", "dropout_threshold", "dropout_inverse"):
        del shared[name]
    block_select[(programs,)](
        q, *q.stride()[:3], k, *k.stride()[:3], softmax.maximum, softmax.total,
        c_ptr=c, c_limit=c_limit(lists.capacity), seed_ptr=seed,
        block_stream=stream_word(problem.static.site, STREAM_BLOCK),
        scratch_ptr=q.new_empty(programs * scratch_keys, dtype=torch.float32),
        found_ptr=lists.found, inverse_ptr=lists.inverse, count_ptr=lists.counts, capacity=lists.capacity,
        batches=b, heads=h, group=problem.group, m=m, n=n, scratch_keys=scratch_keys, blocks=blocks, programs=programs,
        BM=ROWS, BN=sizes.bs, TK=_KEYS, num_warps=sizes.block_select[0], num_stages=sizes.block_select[1], **shared,
    )  # fmt: skip


def launch_block_backward(
    problem: Problem,
    grad: Tensor,
    out: Tensor,
    softmax: Softmax,
    lists: BlockLists,
    dropout_seed: Tensor,
    bias_grad: bool,
) -> tuple[Gradients, Tensor | None, Tensor]:
    """Gradients of query, key and value; dS [B, H, blocks, ROWS, capacity] if wanted; the number of entries.

    dK and dV are summed by atomics, or in a fixed order if deterministic algorithms are asked for.
    """
    q, k, v, grad, out = (dense_last(x) for x in (problem.query, problem.key, problem.value, grad, out))
    (b, h, m, d), (_, groups, n, e), sizes = q.shape, v.shape, sizes_of(problem)
    items, capacity = lists.counts.numel(), lists.capacity
    fixed = torch.are_deterministic_algorithms_enabled()
    delta = launch_delta(grad, out)
    dquery = q.new_empty((b, h, m, d))
    # One row more, for the slots that are not in use.
    dkey, dvalue = (q.new_zeros((b * groups * n + 1, width), dtype=torch.float32) for width in (d, e))
    dlogit = q.new_zeros((*lists.counts.shape, ROWS, capacity), dtype=torch.float32) if bias_grad else None
    used = q.new_empty(items, dtype=torch.int32)
    wave = max(1, _PARTIAL // (4 * capacity * (d + e))) if fixed else items
    shared = shared_arguments(problem, dropout_seed)
    for first in range(0, items, wave):
        programs = min(wave, items - first)
        rows = (q.new_empty((programs * capacity, w), dtype=torch.float32) for w in (d, e)) if fixed else (dkey, dvalue)
        key_rows, value_rows = rows
        block_backward[(programs,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], grad, *grad.stride()[:3],
            softmax.maximum, softmax.total, delta, grad_scale=problem.static.scale,
            found_ptr=lists.found, inverse_ptr=lists.inverse, count_ptr=lists.counts, capacity=capacity,
            dquery_ptr=dquery, dkey_ptr=key_rows, dvalue_ptr=value_rows, dlogit_ptr=dlogit, used_ptr=used,
            first=first, heads=h, group=problem.group, m=m, n=n, blocks=lists.counts.shape[2],
            BM=ROWS, BK=sizes.bk, PARTIAL=fixed,
            num_warps=sizes.block_backward[0], num_stages=sizes.block_backward[1], **shared,
        )  # fmt: skip
        if fixed:
            at = _places(problem, lists, first, programs)
            dkey.index_add_(0, at, key_rows)
            dvalue.index_add_(0, at, value_rows)
    dkey, dvalue = (x[:-1].view(b, groups, n, -1).to(q.dtype) for x in (dkey, dvalue))
    return Gradients(dquery, dkey, dvalue, None, None), dlogit, used.sum()


def _places(problem: Problem, lists: BlockLists, first: int, programs: int) -> Tensor:
    """Rows of dK that the slots of some blocks add to; the one behind the last where a slot is not in use."""
    (b, groups, n, _), h, device = problem.key.shape, problem.query.shape[1], lists.found.device
    plane = torch.arange(first, first + programs, device=device)[:, None] // lists.counts.shape[2]
    at = (plane // h * groups + plane % h // problem.group) * n + lists.found.flatten(0, 2)[first : first + programs]
    counts = lists.counts.flatten()[first : first + programs, None]
    slot = torch.arange(lists.capacity, device=device)
    return torch.where(slot < counts, at, b * groups * n).flatten()
