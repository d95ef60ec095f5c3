"""Where attention may be: softmaxes in every spelling, and the products that their results enter."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from fx_passes.canonicalise.contraction import is_contraction
from fx_passes.canonicalise.probs import mixes
from fx_passes.canonicalise.views import is_cast, is_view
from fx_passes.find.trace import Trace, Value

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_WORDS = ("softmax", "softmin", "exp", "attention", "multi_head")
_NOT = ("expand", "expm1", "explicit", "export")
_THROUGH = {
    aten.dropout.default, aten.neg.default, aten.nan_to_num.default, aten.slice.Tensor,
    aten.mul.Tensor, aten.div.Tensor, aten.sum.dim_IntList, aten.mean.dim,
    aten.add.Tensor, aten.sub.Tensor, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar,
}  # fmt: skip
_LIMIT = 80


def is_anchor(node: Node) -> bool:
    """Whether a node's operations may hold a softmax, by its name."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return False
    name = str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
    if node.op == "call_module":
        owner = node.graph.owning_module
        name = type(owner.get_submodule(name)).__name__ if owner is not None else name
    name = name.lower()
    return (
        any(word in name for word in _WORDS) and not any(word in name for word in _NOT) and "sus" not in name.split(".")
    )


def softmaxes(trace: Trace, node: Node) -> list[Value]:
    """The softmaxes, exponentials and scaled_dot_product_attention calls among a node's operations."""
    record = trace.record(node)
    if record is None:
        return []
    return [v for v in record.values if v.op in (aten.softmax.int, aten.exp.default, SDPA)]


def products(trace: Trace, soft: Value) -> list[Value]:
    """The products that a softmax's result enters, through operations that may stand between."""
    found: list[Value] = []
    seen: set[int] = set()
    todo = [soft]
    while todo and len(seen) < _LIMIT:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for user in trace.users(value):
            if is_contraction(user):
                if user not in found:
                    found.append(user)
                if mixes(trace.context, user):
                    todo.append(user)
            elif user.op is not operator.getitem and (user.op in _THROUGH or is_view(user) or is_cast(user)):
                todo.append(user)
    return found
