"""Which attentions between DTensors may be rewritten: those whose batch entries and heads alone are sharded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fx_passes.canonicalise.axes import Axis, FailedMatch, Operand, leaves, resolve
from fx_passes.canonicalise.lower import LoweredTerm
from fx_passes.ops.sharding import is_dtensor


def check_sharding(terms: Iterable[LoweredTerm]) -> None:
    """Raises FailedMatch, with the reason, where operands are DTensors that the operator does not take."""
    for term in terms:
        operands = {"the logits": term.term.softmax.source, "value": term.value}
        if term.product is not None:
            operands = {"query": term.product.query, "key": term.product.key, "value": term.value}
        found = [_sharded(name, x, term) for name, x in operands.items()]
        if any(axes != found[0] for axes in found):
            raise FailedMatch("query, key and value are DTensors that are sharded in different ways")


def _sharded(name: str, operand: Operand, term: LoweredTerm) -> list[tuple[Axis, Any]]:
    """For each dimension of the mesh the axis that is sharded over it; empty for a plain tensor."""
    fake: Any = operand.value.fake
    if not is_dtensor(fake):
        return []
    roles, layout = term.dims, resolve(operand.layout)
    outermost = [leaves(axes)[0] for axes in (roles.batch, roles.query_heads) if leaves(axes)]
    axes: list[tuple[Axis, Any]] = []
    ranks: dict[Axis, int] = {}
    for size, placement in zip(fake.device_mesh.shape, fake.placements, strict=True):
        dim = layout[placement.dim] if placement.is_shard() else ()
        if not dim or dim[0] not in outermost:
            raise FailedMatch(
                f"{name} is a DTensor with the placements {fake.placements}: only shards of batch and heads are taken"
            )
        axis = dim[0]
        ranks[axis] = ranks.get(axis, 1) * size
        if not isinstance(axis.size, int) or axis.size % ranks[axis]:
            raise FailedMatch(f"{name} is a DTensor whose {axis.size} parts are sharded unevenly over ranks")
        axes.append((axis, fake.device_mesh))
    return axes
