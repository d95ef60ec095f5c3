"""Offsets beyond 2^31 elements in Triton's interpreter: tensors of huge strides in a sparse file.

`tests/ops/test_cuda.py` runs it in a process of its own.
"""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cuda.calls import problem, run

interpreter.install()

FAR = 1 << 32  # elements


def spread(x: Tensor, dim: int, path: Path) -> Tensor:
    """An equal tensor whose last index of `dim` lies `FAR` elements behind its first one."""
    inner = [1 if i == x.dim() - 1 else 0 for i in range(x.dim())]
    step = 64 * x.shape[-1]
    order = [i for i in range(x.dim() - 1) if i != dim]
    strides = list(inner)
    for i in reversed(order):
        strides[i] = step
        step *= x.shape[i]
    far = -(-FAR // max(1, x.shape[dim] - 1) // step) * step
    strides[dim] = max(far, step)
    size = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    whole = torch.from_file(str(path), shared=True, size=size, dtype=x.dtype)
    result = whole.as_strided(x.shape, strides)
    result.copy_(x)
    assert sum((n - 1) * s for n, s in zip(x.shape, result.stride(), strict=True)) >= FAR
    return result


@pytest.mark.parametrize("sampler", ["systematic", "block"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_inputs_spread_over_more_than_int32(dim: int, sampler: str, tmp_path: Path) -> None:
    p = problem(b=2, h=4, g=2, m=40, n=40, dtype=torch.float16, static={"right": 0, "sampler": sampler})
    grad = torch.randn(p.query.shape, generator=torch.Generator().manual_seed(0)).half()
    right = run(p, 8.0, grad)
    names = ("query", "key", "value")
    far = {name: spread(getattr(p, name), dim, tmp_path / name) for name in names}
    found = run(replace(p, **far), 8.0, spread(grad, dim, tmp_path / "grad"))
    assert torch.equal(found["out"], right["out"])
    for name in names:
        assert torch.allclose(getattr(found["gradients"], name), getattr(right["gradients"], name), atol=1e-3), name
