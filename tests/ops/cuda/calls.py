"""Calls of the kernels and their check against the float64 reference, on whatever device runs them.

In the interpreter that is the CPU (`check_kernels` sets TRITON_INTERPRET first), else the GPU (`test_cuda_gpu`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fx_passes.ops.cuda import attention, launch, lists
from fx_passes.ops.problem import Problem, Static, Upstream
from fx_passes.ops.reference import Dense, dense_attention, sus_gradients
from fx_passes.ops.tiled.dropout import dropout_factor
from fx_passes.ops.tiled.tiles import Tile

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"
SEED = torch.tensor(0x1234_5678_9ABC, device=DEVICE)
_TENSORS = ("attn_mask", "attn_bias", "sinks", "query_ids", "key_ids", "prefix")
TOLERANCE = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(
    b: int = 1, h: int = 2, g: int = 1, m: int = 96, n: int = 160, d: int = 16, e: int = 16,
    dtype: torch.dtype = torch.float32, spread: float = 1.0, static: dict[str, Any] | None = None, **tensors: Tensor,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(b + 2 * h + 3 * m + 5 * n + 7 * d)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    given = {name: tensors[name].to(DEVICE) if name in tensors else None for name in _TENSORS}
    options = {"scale": spread * d**-0.5, **(static or {})}
    return Problem(new(b, h, m, d), new(b, g, n, d), new(b, g, n, e), **given, static=Static(**options))  # type: ignore[arg-type]


def dense(p: Problem) -> Dense:
    s = p.static
    given = {name: getattr(p, name) for name in _TENSORS}
    return Dense(
        p.query, p.key, p.value, **given,
        scale=s.scale, left=s.left, right=s.right, bottom_right=s.bottom_right, softcap=s.softcap,
    )  # fmt: skip


def dropout(p: Problem) -> Tensor | None:
    if not p.static.dropout_p:
        return None
    shape = (*p.query.shape[:3], p.key.shape[2])
    return dropout_factor(p, SEED, Tile(0, 0, torch.zeros(shape, device=DEVICE), None, None))


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30))


def run(p: Problem, c: float, grad: Tensor | None = None) -> dict[str, Any]:
    """Forward and backward with everything that a test may look at."""
    c_tensor = torch.tensor(c, dtype=torch.float64, device=DEVICE)
    out, softmax, kept = attention.forward(p, c_tensor, SEED, SEED)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out) if grad is None else grad
    bias_grad = p.attn_bias is not None
    results = []

    def spy(*args: Any) -> Any:
        results.append(launch.launch_backward(*args))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "launch_backward", spy)
        gradients, count = attention.backward(p, Upstream(grad, out, softmax, kept, c_tensor, SEED, SEED, bias_grad))
    found = lists.find_lists(kept, p)
    key = results[0][1].view(*p.query.shape[:3], -1).long() if results else None
    return {
        "out": out,
        "softmax": softmax,
        "kept": kept,
        "grad": grad,
        "gradients": gradients,
        "count": count,
        "key": key,
        "lists": found,
    }


def kept_matrix(p: Problem, key: Tensor) -> Tensor:
    """How often each (row, key) is in the lists."""
    matrix = torch.zeros(*p.query.shape[:3], p.key.shape[2] + 1, dtype=torch.int64, device=key.device)
    matrix.scatter_add_(-1, torch.where(key < 0, p.key.shape[2], key), torch.ones_like(key))
    return matrix[..., :-1]


def check_blind(r: dict[str, Any], weights: Tensor) -> None:
    """Rows that see no key are zero, and so is their gradient."""
    blind = ~weights.any(-1)
    assert not r["out"][blind].any()
    assert not r["gradients"].query[blind].any()


def check(p: Problem, c: float) -> dict[str, Any]:
    """Out, softmax and gradients of a call against the reference, with the entries that it kept itself."""
    r, reference, factor = run(p, c), dense(p), dropout(p)
    limit = TOLERANCE[p.query.dtype]
    assert error(r["out"], dense_attention(reference, factor)) < limit
    weights = reference.weights(reference.logits())
    shown = torch.exp(reference.logits() - r["softmax"].maximum[..., None].double()) / r["softmax"].total[..., None]
    assert error(shown, weights) < limit
    check_blind(r, weights)
    matrix = kept_matrix(p, r["key"])
    assert matrix.max() <= 1, "an entry is in a list twice"
    assert int(matrix.sum()) == int(r["count"])
    q = (c * weights).clamp(max=1)
    assert not (matrix.bool() & (weights == 0)).any()
    assert matrix[q >= 1 - 1e-6].double().mean().nan_to_num(1) > 0.999  # what is certain is there
    gradients = sus_gradients(reference, r["grad"], matrix / q.clamp(min=1e-30), factor)
    for name, right in gradients.items():
        assert error(getattr(r["gradients"], name), right) < 4 * limit, name
    return r


def check_expectation(p: Problem, c: float) -> None:
    """256 heads with equal contents draw independently: their mean is within the error that their spread predicts."""
    (_, _, m, _), n, e, heads = p.query.shape, p.key.shape[2], p.value.shape[-1], 256
    wide = Problem(*(x.expand(-1, heads, -1, -1) for x in (p.query, p.key, p.value)), *[None] * 6, static=p.static)
    grad = torch.randn(1, 1, m, e, generator=torch.Generator().manual_seed(1)).to(p.query)
    r = run(wide, c, grad.expand(1, heads, m, e))
    exact = sus_gradients(dense(p), grad, torch.ones(1, 1, m, n, device=DEVICE))
    for name in ("query", "key", "value"):
        samples = getattr(r["gradients"], name)[0].double()
        noise = samples.var(0).sum().div(heads).sqrt()
        assert (samples.mean(0) - exact[name][0, 0]).norm() < 1.3 * noise, name
        assert noise < 0.3 * exact[name].norm()


def check_lost_lists(p: Problem, c: float) -> None:
    """A copy of `kept` has no lists behind it; the backward draws them again, the same ones."""
    r = run(p, c)
    number = torch.tensor(c, dtype=torch.float64, device=DEVICE)
    upstream = Upstream(r["grad"], r["out"], r["softmax"], r["kept"].clone(), number, SEED, SEED)
    again, count = attention.backward(p, upstream)
    assert count == r["count"]
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(again, name), getattr(r["gradients"], name))


def _spread(x: Tensor, dim: int, distance: int, allocate: Callable[[int], Tensor]) -> Tensor:
    """An equal tensor whose last index of `dim` lies at least `distance` elements behind its first one."""
    step = 64 * x.shape[-1]
    strides = [0, 0, 0, 1]
    for i in reversed([i for i in range(3) if i != dim]):
        strides[i] = step
        step *= x.shape[i]
    strides[dim] = -(-distance // (x.shape[dim] - 1) // step) * step
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    result = allocate(size).as_strided(x.shape, strides)
    result.copy_(x)
    assert (x.shape[dim] - 1) * result.stride(dim) >= distance
    return result


def check_offsets(sampler: str, dim: int, distance: int, allocate: Callable[[int], Tensor]) -> None:
    """Inputs that lie so far apart along a dimension that int32 does not hold their offsets change nothing.

    Args:
        allocate: makes a float16 vector of so many elements.
    """
    p = problem(b=2, h=4, g=2, m=40, n=40, dtype=torch.float16, static={"right": 0, "sampler": sampler})
    # One tile: "tile" is exact here, and so is its other offset.
    grad = torch.randn(p.query.shape, generator=torch.Generator().manual_seed(0)).to(p.query)
    right = run(p, 8.0, grad)
    names = ("query", "key", "value")
    far = {name: _spread(getattr(p, name), dim, distance, allocate) for name in names}
    found = run(replace(p, **far), 8.0, _spread(grad, dim, distance, allocate))  # type: ignore[arg-type]
    assert torch.equal(found["out"], right["out"])
    for name in names:
        assert torch.allclose(getattr(found["gradients"], name), getattr(right["gradients"], name), atol=1e-3), name
