"""`attend(return_lse=True)`: the logsumexp of each row and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_passes.ops.functional import attend

B, H, N, D = 1, 2, 24, 16
DRAWS = 400


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    qkv = [torch.randn(B, H, N, D, generator=g, dtype=dtype).requires_grad_() for _ in range(3)]
    return qkv, torch.randn(B, H, N, D, generator=g, dtype=dtype), torch.randn(B, H, N, generator=g, dtype=dtype)


def exact(qkv: list[Tensor], grad: Tensor, lse_grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    scores = (q @ k.mT * D**-0.5).masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), -torch.inf)
    lse = scores.logsumexp(-1)
    loss = (scores.softmax(-1) @ v * grad.double()).sum() + (lse * lse_grad.double()).sum()
    return lse.detach(), torch.autograd.grad(loss, (q, k, v))


def sus(qkv: list[Tensor], grad: Tensor, lse_grad: Tensor, c: float, seed: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    c_tensor = torch.tensor(c, dtype=torch.float64)
    out, lse = attend(*qkv, c_tensor, torch.tensor(seed), right=0, return_lse=True)
    return lse.detach(), torch.autograd.grad((out * grad).sum() + (lse * lse_grad).sum(), qkv)


def test_exact_at_infinity() -> None:
    for dtype, tol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        given = inputs(dtype)
        (lse, grads), (expected, wanted) = sus(*given, float("inf"), 0), exact(*given)
        for a, b in zip((lse, *grads), (expected, *wanted), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tol, atol=tol)


def test_unbiased() -> None:
    given = inputs(torch.float32)
    _, wanted = exact(*given)
    draws = [torch.cat([g.flatten().double() for g in sus(*given, 2.0, seed * 7919)[1]]) for seed in range(DRAWS)]
    samples, target = torch.stack(draws), torch.cat([g.flatten() for g in wanted])
    error = samples.std(0) / DRAWS**0.5
    z = ((samples.mean(0) - target) / error)[error > 1e-4]
    assert z.numel() > 1000
    assert 0.8 < float(z.square().mean()) < 1.25


def test_gradients_of_gradients() -> None:
    g = torch.Generator().manual_seed(1)
    q, k, v, bias = (torch.randn(1, 2, 5, n, generator=g, dtype=torch.float64).requires_grad_() for n in (4, 4, 4, 5))
    sinks = torch.randn(2, generator=g, dtype=torch.float64).requires_grad_()
    c = torch.tensor(float("inf"), dtype=torch.float64)
    found = attend(q, k, v, c, torch.tensor(1), attn_bias=bias, sinks=sinks, right=0, return_lse=True)
    logits = (q @ k.mT * 0.5 + bias).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    logits = torch.cat([logits, sinks[None, :, None, None].expand(1, 2, 5, 1)], -1)
    true = logits.softmax(-1)[..., :-1] @ v, logits.logsumexp(-1)
    inputs, seconds = (q, k, v, bias, sinks), []
    for out, lse in (found, true):
        first = torch.autograd.grad(out.sin().sum() + (lse.cos() * lse).sum(), inputs, create_graph=True)
        seconds.append(torch.autograd.grad(sum((x**2).sum() for x in first), inputs))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
