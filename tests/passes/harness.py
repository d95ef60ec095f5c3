"""Runs a function plain and rewritten, and compares results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fx_passes import Report, SUSBackend


def run(f: Callable[..., Any], args: tuple[Any, ...], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Float outputs, and the gradients of a fixed function of them for every float argument."""
    args = tuple(
        a.detach().clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args
    )
    torch.manual_seed(seed)
    outs = [o for o in tree_leaves(f(*args)) if isinstance(o, Tensor) and o.requires_grad]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return outs, [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, grads, strict=True)]


def compare(
    f: Callable[..., Any], *args: Any, compiler: str = "eager", dynamic: bool = False, tol: float = 1e-9
) -> Report:
    """The report of compiling `f`; asserts exactness at c = inf, and at c = 2 the same forward and other gradients.

    NaN must stand where it stands without the rewrite: the gradient of what multiplies -inf is one.
    """
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler=compiler)
    compiled = torch.compile(f, backend=backend, dynamic=dynamic)
    outs, grads = run(f, args)
    got, got_grads = run(compiled, args)
    for a, b in zip([*got, *got_grads], [*outs, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)
    backend.c = 2
    got, got_grads = run(compiled, args)
    for a, b in zip(got, outs, strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)
    if backend.report.rewritten:
        moved = any(not torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(got_grads, grads, strict=True))
        assert moved, "at c = 2 the gradients are those of c = inf"
    return backend.report


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
