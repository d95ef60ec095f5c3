"""c = inf: outputs and gradients of every feature against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fx_passes.ops.reference import dense_attention
from tests.ops.cases import CASES, dense, run

INF = float("inf")


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm().clamp_min(1e-6))


def oracle(tensors: dict[str, Tensor], static: dict, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    exact = {
        name: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for name, x in tensors.items()
    }
    out = dense_attention(dense(exact, static))
    wanted = {name: x for name, x in exact.items() if x.requires_grad}
    return out.detach(), dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad.double()), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    tensors, static, grad = CASES[name].build(dtype)
    out, grads = run(tensors, static, grad, INF)
    true_out, true_grads = oracle(tensors, static, grad)
    bound = 1e-12 if dtype == torch.float64 else 2e-5 if name == "uniform rows" else 3e-6
    assert error(out, true_out) < bound
    assert grads.keys() == true_grads.keys()
    for key, true in true_grads.items():
        assert grads[key].dtype == dtype
        assert error(grads[key], true) < bound, key


@pytest.mark.parametrize("name", ["causal", "GQA", "mask", "bias", "softcap", "sinks"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_eager(name: str, dtype: torch.dtype) -> None:
    """The bound is the error of eager attention in the same dtype, as no fixed tolerance is right for all shapes."""
    tensors, static, grad = CASES[name].build(dtype)
    out, grads = run(tensors, static, grad, INF)
    true_out, true_grads = oracle(tensors, static, grad)
    eager_out, eager_grads = eager(tensors, static, grad)
    assert error(out, true_out) <= 1.1 * error(eager_out, true_out)
    for key, true in true_grads.items():
        assert error(grads[key], true) <= 1.1 * error(eager_grads[key], true) + 1e-4, key


def eager(tensors: dict[str, Tensor], static: dict, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    problem = dense(tensors, static)
    group = problem.query.shape[1] // problem.key.shape[1]
    logits = problem.query @ problem.key.repeat_interleave(group, 1).mT * problem.query.shape[-1] ** -0.5
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    if problem.attn_bias is not None:
        logits = logits + problem.attn_bias
    logits = logits.masked_fill(~problem.visible(), -torch.inf)
    if problem.sinks is not None:
        logits = torch.cat([logits, problem.sinks[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : problem.key.shape[2]]
    out = weights @ problem.value.repeat_interleave(group, 1)
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    return out.detach(), dict(zip(wanted, torch.autograd.grad(out, list(wanted.values()), grad), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_forward_does_not_depend_on_c(name: str) -> None:
    tensors, static, grad = CASES[name].build()
    outs = [run(tensors, static, grad, c, seed)[0] for c, seed in ((INF, 0), (3.0, 1), (50.0, 2))]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_large_c_is_exact() -> None:
    """q = min(1, c W) is 1 for every entry, so that nothing is left to chance."""
    tensors, static, grad = CASES["causal"].build(torch.float64)
    exact = run(tensors, static, grad, INF)[1]
    for sampler in ("systematic", "independent"):
        found = run(tensors, static, grad, 1e9, sampler=sampler)[1]
        for key in exact:
            assert error(found[key], exact[key]) < 1e-7
