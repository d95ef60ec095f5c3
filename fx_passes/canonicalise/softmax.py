"""Softmax in its spellings: the operator, exp of log_softmax or of x - logsumexp(x). Over its own sum: `row_sums.py`.

torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v
softmax(scores) @ v
"""

from __future__ import annotations

import operator
from typing import Any

import torch

from fx_passes.canonicalise.views import uncast
from fx_passes.find.trace import Value

aten = torch.ops.aten
_PURE = {
    operator.getitem, aten.exp.default, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.detach.default,
    aten.amax.default, aten.max.dim,
}  # fmt: skip


def same(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two values are one and the same, or computed twice in the same way."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return type(a) is type(b) and bool(a == b)
    a, b = uncast(a), uncast(b)
    if a is b or a.op is not b.op or a.op not in _PURE or not depth:
        return a is b
    if len(a.args) != len(b.args) or a.kwargs or b.kwargs:
        return False
    return all(same(x, y, depth - 1) for x, y in zip(a.args, b.args, strict=True))


def softmax_input(value: Value) -> tuple[Value, int] | None:
    """What a value is the softmax of, and over which dimension; None where it is no normalised softmax by itself."""
    if value.op is aten.softmax.int:
        return value.args[0], value.args[1] % len(value.shape)
    if value.op is aten.exp.default:
        inner = uncast(value.args[0])
        if inner.op is aten.log_softmax.int:
            return inner.args[0], inner.args[1] % len(value.shape)
        if inner.op is aten.sub.Tensor and isinstance(inner.args[1], Value):
            return _minus_logsumexp(inner)
    return None


def _minus_logsumexp(value: Value) -> tuple[Value, int] | None:
    total = uncast(value.args[1])
    if total.op is aten.log.default:
        return _minus_log_of_sum(value, uncast(total.args[0]))
    squeezed = False
    if total.op is aten.unsqueeze.default:
        squeezed, dim, total = True, total.args[1] % len(value.shape), uncast(total.args[0])
    if total.op is not aten.logsumexp.default or not same(total.args[0], value.args[0]):
        return None
    dims, keepdim = total.args[1], len(total.args) > 2 and total.args[2]
    if len(dims) != 1 or bool(keepdim) == squeezed:
        return None
    over = dims[0] % len(value.shape)
    return None if squeezed and dim != over else (value.args[0], over)


def _minus_log_of_sum(value: Value, total: Value) -> tuple[Value, int] | None:
    """``x - exp(x).sum(dim, keepdim=True).log()``."""
    if total.op is not aten.sum.dim_IntList or len(total.args) < 3 or not total.args[2] or len(total.args[1]) != 1:
        return None
    inner = uncast(total.args[0])
    if inner.op is not aten.exp.default or not same(inner.args[0], value.args[0]):
        return None
    return value.args[0], total.args[1][0] % len(value.shape)
