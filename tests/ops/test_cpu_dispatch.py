"""The native CPU kernel behind the operator: caches, the library's forward, compiled calls, what it does not take."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fx_passes import SUSBackend, sus_attention
from fx_passes.ops import cpu, dispatch, tiled
from fx_passes.ops.cpu import bind, kept
from fx_passes.ops.problem import Upstream
from tests.ops.cpu_cases import CASES, DROPOUT_SEED, Case, draw, run, tensor

pytestmark = pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")

ZERO = torch.tensor(0)


@pytest.mark.parametrize("name", ["causal 257", "dropout", "bias"])
def test_a_copied_cache_falls_back_to_the_same_draw(name: str) -> None:
    case = CASES[name]
    problem, grad = case.problem(), case.grad()
    c, seed, dropout_seed = tensor(8.0), torch.tensor(11), torch.tensor(-(1 << 61) + 5)
    out, softmax, cache = dispatch.forward(problem, c, seed, dropout_seed)
    assert cache.shape == (1,)
    biased = problem.attn_bias is not None
    native = dispatch.backward(problem, Upstream(grad, out, softmax, cache, c, seed, dropout_seed, biased))
    copied = dispatch.backward(problem, Upstream(grad, out, softmax, cache.clone(), c, seed, dropout_seed, biased))
    for field in ("query", "key", "value", *(["attn_bias"] if biased else [])):
        a, b = getattr(native, field), getattr(copied, field)
        assert float((a - b).norm() / a.norm()) < 0.03  # but for a point on a rounding boundary
    other = cpu.backward(problem, Upstream(grad, out, softmax, cache, c, torch.tensor(12), dropout_seed, biased))
    assert other is None, "a cache of another seed was taken"
    other = cpu.backward(problem, Upstream(grad, out, softmax, cache, c, seed, ZERO, biased))
    assert (other is None) == (problem.static.dropout_p > 0), (
        "only dropout's seed decides whether that of dropout counts"
    )


@pytest.mark.parametrize(
    "name", ["sinks", "sinks and all else", "long softcap", "documents", "dropout", "long dropout"]
)
def test_sampling_for_another_forward(name: str) -> None:
    problem = CASES[name].problem()
    caches = [run(problem, 8.0, 5).cache, cpu.sample(problem, tensor(8.0), torch.tensor(5), DROPOUT_SEED)]
    ours, theirs = (kept.unpack(cache, problem, draw(problem, 8.0, 5)) for cache in caches)
    for field in ("offsets", "keys", "weights", "sinks"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))


def test_library_forward_keeps_its_bits() -> None:
    q, k, v = (torch.randn(1, 4, 300, 64, requires_grad=True) for _ in range(3))
    out = sus_attention(q, k, v, is_causal=True, c=8, seed=4, forward="library")
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    own = sus_attention(q, k, v, is_causal=True, c=8, seed=4)
    a = torch.autograd.grad(out.square().sum(), (q, k, v))
    b = torch.autograd.grad(own.square().sum(), (q, k, v))
    for x, y in zip(a, b, strict=True):
        assert float((x - y).norm() / x.norm()) < 0.03


@pytest.mark.parametrize("forward", ["auto", "library"])
def test_dropout_drops_the_same_for_every_forward_and_backward(forward: str) -> None:
    q, k, v = (torch.randn(2, 4, 200, 64, requires_grad=True) for _ in range(3))

    def run(c: float, forward: str) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(5)
        out = sus_attention(q, k, v, is_causal=True, c=c, dropout_p=0.2, forward=forward)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    # c W is at least 1 for nearly all of the weight, and those entries are kept; at c = inf, PyTorch computes.
    for x, y in zip(run(1e9, forward), run(math.inf, "auto"), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_exact_backward_takes_the_native_forward() -> None:
    q, k, v = (torch.randn(2, 4, 200, 64, requires_grad=True) for _ in range(3))
    ours = torch.autograd.grad(sus_attention(q, k, v, is_causal=True, c=math.inf).square().sum(), (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    theirs = torch.autograd.grad(out.square().sum(), (q, k, v))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_what_it_leaves_to_the_tiled_path() -> None:
    problem = Case().problem()
    other = [
        replace(problem, static=replace(problem.static, scale=-1.0)),
        Case(d=257, e=24).problem(),
        Case(prefix=5, left=9, right=0).problem(),
        replace(problem, query=problem.query.double(), key=problem.key.double(), value=problem.value.double()),
    ]
    assert cpu.supports(problem)
    assert not any(cpu.supports(x) for x in other)
    independent = replace(problem, static=replace(problem.static, sampler="independent"))
    out, softmax, cache = dispatch.forward(independent, tensor(4.0), ZERO, ZERO)
    upstream = Upstream(Case().grad(), out, softmax, cache, tensor(4.0), ZERO, ZERO)
    found = dispatch.backward(independent, upstream)
    expected, _ = tiled.backward(independent, upstream)
    assert torch.equal(found.query, expected.query)


@pytest.mark.parametrize(
    ("options", "sampler", "reason"),
    [
        ({}, "systematic", None),
        ({"dropout_p": 0.1}, "systematic", None),
        ({"scale": -0.1}, "systematic", None),
        ({"scale": 1e20}, "systematic", "scale 1e+20"),
        ({"attn_mask": torch.ones(64, 64)}, "systematic", None),
        ({"attn_mask": torch.ones(64, 64, requires_grad=True)}, "systematic", None),
        ({}, "independent", "backward: sampler 'independent'"),
    ],
)
def test_the_report_says_which_calls_are_not_native(options: dict, sampler: str, reason: str | None) -> None:
    torch._dynamo.reset()
    backend = SUSBackend(c=8, compiler="aot_eager", sampler=sampler)
    attention = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), backend=backend)
    q = torch.randn(1, 2, 64, 32, requires_grad=True)
    for _ in range(2):
        attention(q, q, q).sum().backward()
    expected = f"rewritten (PyTorch path: {reason}, 2 calls)" if reason else "rewritten"
    assert str(backend.report).endswith(f"  {expected}")


def test_compiled() -> None:
    q, k, v = (torch.randn(1, 2, 128, 32, requires_grad=True) for _ in range(3))

    def f(q, k, v):
        return sus_attention(q, k, v, is_causal=True, c=tensor(6.0), seed=torch.tensor(3)).square().sum()

    eager = torch.autograd.grad(f(q, k, v), (q, k, v))
    compiled = torch.autograd.grad(torch.compile(f, backend="aot_eager")(q, k, v), (q, k, v))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    args = (*(torch.randn(1, 2, 70, 32, requires_grad=True) for _ in range(3)), *(None,) * 6)
    tail = (tensor(5.0), ZERO, ZERO, 0.2, None, 0, False, 0.0, 0.0, "systematic", "auto", True, 0, 0)
    torch.library.opcheck(torch.ops.sus.attention.default, (*args, *tail))
