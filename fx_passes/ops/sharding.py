"""DTensor operands: each rank runs attention on the batch entries and heads that it holds, without communication.

Ranks draw for themselves, so no two may hold the same rows: placements other than shards of batch and heads are not
taken. `fx_passes.rewrite.sharding` leaves such attentions as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

_PER_HEAD = ("sinks",)  # [H]
_PER_SEQUENCE = ("query_ids", "key_ids", "prefix")  # [B or 1, ...]
_PER_WEIGHT = ("attn_mask", "attn_bias")  # up to [*lead, M, N]


def is_dtensor(x: Any) -> bool:
    return isinstance(x, Tensor) and hasattr(x, "device_mesh")  # importing DTensor takes longer than this package


def whole(x: Tensor) -> Tensor | None:
    """A plain tensor as it is, a DTensor that every rank holds whole as a plain one, and None for others."""
    if not is_dtensor(x):
        return x
    replicated = all(p.is_replicate() for p in x.placements)  # type: ignore[attr-defined]
    return x.to_local() if replicated else None  # type: ignore[attr-defined]


def on_shards(attend: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function that takes DTensors too: [*lead, M, D] sharded along leading dimensions.

    Its first tensors are query, key and value (or logits and value), c and the seed. What is a plain tensor beside
    DTensors is the same on all ranks. The results are sharded as the query is.
    """
    parameters = inspect.signature(attend).parameters.values()
    names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]

    @functools.wraps(attend)
    def call(*args: Any, **options: Any) -> Any:
        if not any(is_dtensor(x) for x in (*args, *options.values())):
            return attend(*args, **options)
        return _on_shards(attend, *args, *(options.pop(name) for name in names[len(args) :]), **options)

    return call


def _on_shards(attend: Callable[..., Any], first: Tensor, *others: Any, **options: Any) -> Any:
    from torch.distributed.tensor import DTensor

    *operands, c, seed = others
    mesh, dims = _shards(first, operands)
    rank = first.dim()
    local = [_local(x, mesh, dims) for x in (first, *operands)]
    for name, x in options.items():
        if not isinstance(x, Tensor):
            continue
        if name in _PER_HEAD:
            wanted = [0 if d == rank - 3 else None for d in dims]
        elif name in _PER_SEQUENCE:
            wanted = [0 if d == 0 and rank == 4 and x.shape[0] > 1 else None for d in dims]
        elif name in _PER_WEIGHT:
            missing = rank - x.dim()
            wanted = [d - missing if d >= missing and x.shape[d - missing] > 1 else None for d in dims]
        else:
            wanted = [None] * len(dims)
        options[name] = _local(x, mesh, wanted)
    none: list[int | None] = [None] * len(dims)
    out = attend(*local, _local(c, mesh, none), _local(seed, mesh, none), **options)
    results = [
        DTensor.from_local(x, mesh, _placements(dims), run_check=False)
        for x in (out if isinstance(out, tuple) else (out,))
    ]
    return tuple(results) if isinstance(out, tuple) else results[0]


def _shards(first: Tensor, operands: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """The mesh, and for each of its dimensions the leading dimension of the operands that is sharded over it."""
    for x in (first, *operands):
        if not is_dtensor(x) or x.device_mesh != first.device_mesh:  # type: ignore[attr-defined]
            raise TypeError("query, key and value must all be DTensors of one mesh, or all plain tensors")
    mesh: Any = first.device_mesh  # type: ignore[attr-defined]
    dims: list[int] = []
    for placement in first.placements:  # type: ignore[attr-defined]
        if not placement.is_shard() or not 0 <= placement.dim < first.dim() - 2:
            raise ValueError(
                f"the query must be sharded along batch or heads over each dimension of its mesh, but its placements "
                f"are {first.placements}"  # type: ignore[attr-defined]
            )
        dims.append(placement.dim)
    for x in (first, *operands):
        for d in dims:
            ranks = 1
            for i, other in enumerate(dims):
                ranks *= mesh.size(i) if other == d else 1
            if x.shape[d] % ranks:
                raise ValueError(f"dimension {d} of size {x.shape[d]} cannot be sharded evenly over {ranks} ranks")
    return mesh, dims


def _placements(dims: Sequence[int | None]) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if d is None else Shard(d) for d in dims]


def _local(x: Any, mesh: Any, dims: Sequence[int | None]) -> Any:
    """This rank's part of a tensor that is to be sharded along these dimensions; its gradient is summed elsewhere."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not is_dtensor(x):
        if all(d is None for d in dims) and not x.requires_grad:
            return x
        x = DTensor.from_local(x, mesh, [Replicate()] * len(dims), run_check=False)
    wanted = _placements(dims)
    if list(x.placements) != wanted:
        x = x.redistribute(mesh, wanted)
    return x.to_local(grad_placements=[Partial() if d is None else p for d, p in zip(dims, wanted, strict=True)])
