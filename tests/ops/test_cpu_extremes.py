"""Infinities, NaNs and numbers near overflow: what eager gives, from kernels that never crash.

Eager itself is rounding noise where logits are so large that float32 has no room for differences between them, or for
the sum of weights in a logsumexp: float64 is then the judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fx_passes import sus_attention
from fx_passes.ops import cpu, dispatch
from fx_passes.ops.cpu import bind, kept
from fx_passes.ops.problem import Upstream
from fx_passes.ops.reference import dense_attention
from fx_passes.ops.tiled import extreme
from tests.ops.cpu_cases import CASES, Case, dense, draw, kept_weights, run, tensor

pytestmark = pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")

INF, NAN = math.inf, math.nan
ZERO = torch.tensor(0)
NAMES = ("out", "dq", "dk", "dv", "dmask")
EPSILON = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Call:
    """Arguments of F.scaled_dot_product_attention, and dO."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    mask_grad: bool = False

    def run(self, attention: Callable[..., Tensor], dtype: torch.dtype | None = None, **more: object) -> list[Tensor]:
        """Out and the gradients of query, key, value and, if wanted, of the mask."""
        cast = self.query.dtype if dtype is None else dtype
        inputs = [x.detach().to(cast).clone().requires_grad_() for x in (self.query, self.key, self.value)]
        mask = self.attn_mask
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(cast).clone().requires_grad_(self.mask_grad)
        options = {"attn_mask": mask, "is_causal": self.is_causal, "scale": self.scale, "enable_gqa": True}
        out = attention(*inputs, **options, **more)
        wanted = [*inputs, *([mask] if mask is not None and mask.requires_grad else [])]
        return [out.detach(), *torch.autograd.grad(out, wanted, self.grad.to(cast))]

    def largest_logit(self) -> float:
        """Of those that are finite, with the mask's largest value."""
        key = self.key.double().repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        logits = self.query.double() @ key.mT * scale
        if self.attn_mask is not None and self.attn_mask.dtype != torch.bool:
            logits = logits + self.attn_mask.double()
        finite = logits[logits.isfinite()]
        return float(finite.abs().max()) if finite.numel() else 0.0


def check(call: Call, c: float) -> None:
    """NaN and infinite where eager is, finite where eager is finite; at c = inf and where all is kept, values too."""
    eager = call.run(F.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        exact = call.run(F.scaled_dot_product_attention, torch.float64)
    found = call.run(sus_attention, c=c, seed=3)
    dtype = call.query.dtype
    noise = 2.0**-23 * math.sqrt(call.query.shape[-1]) * call.largest_logit()
    if dtype == torch.float64:
        noise *= 2.0**-29
    inputs = (call.query, call.key, call.value, call.grad)
    spoiled = not all(bool(x.isfinite().all()) for x in inputs)
    overflows = spoiled or any(float(x.abs().max()) > 1e15 for x in inputs)
    # The library's kernel multiplies the causal mask by such scales; what it makes of it depends on the block.
    if call.is_causal and call.scale is not None and call.scale <= 1e-30 and overflows:
        return
    large = call.scale is not None and abs(call.scale) > 1e10  # of subnormal products, which kernels may flush
    for name, theirs, true, ours in zip(NAMES, eager, exact, found, strict=False):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        finite = theirs.isfinite()
        if spoiled and noise > 0.1 and name != "out":  # eager's own rounding decides what overflows
            continue
        assert ours[finite].isfinite().all(), f"{name} is finite in eager"
        # An estimate need not be too large for float16 where the exact gradient is.
        held = true if dtype == torch.float16 and c < INF else true.to(dtype)
        expected = ~finite & ~held.isfinite()
        assert not ours[expected].isfinite().any(), f"{name} is not finite in eager"
        if noise < 0.01 and not spoiled and not large and (name == "out" or c > 1e20):
            largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in (theirs[finite], true[true.isfinite()]))
            terms = largest if name == "out" else max(largest, gradient_terms(call, name))
            # Eager's own value will do: where all of a row overflows, it may be zero.
            error = torch.minimum((ours.double() - true).abs(), (ours.double() - theirs.double()).abs())
            error = error[finite & true.isfinite()]
            sampled = 0.0 if c == INF or name == "out" else 2.0**-28  # weights below the largest c's inverse
            limit = terms * (8 * noise + 64 * EPSILON[dtype] + sampled) + 1e-37
            assert not error.numel() or float(error.max()) <= limit, name


def gradient_terms(call: Call, name: str) -> float:
    """About the largest summand of a gradient, of which rounding errors are a part."""
    query, key, value, grad = (float(x.double().abs().max()) for x in (call.query, call.key, call.value, call.grad))
    scale = abs(call.query.shape[-1] ** -0.5 if call.scale is None else call.scale)
    rows = call.query.shape[1] * call.query.shape[2]
    logit = 2 * grad * value * call.value.shape[-1]
    return {"dq": logit * key * scale, "dk": rows * logit * query * scale, "dv": rows * grad, "dmask": rows * logit}[
        name
    ]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ordinary(m: int = 70, n: int = 300, d: int = 16, dtype: torch.dtype = torch.float32) -> Call:
    q, k, v, grad = (normal(1, 2, size, d, seed=i, dtype=dtype) for i, size in enumerate((m, n, n, m)))
    return Call(q, k, v, grad)


def with_one(x: Tensor, value: float, at: tuple[int, ...] = (0, 0, 3, 1)) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


def column(value: float, m: int = 70, n: int = 300) -> Tensor:
    return with_one(torch.zeros(m, n), value, (slice(None), 5))  # type: ignore[arg-type]


BASE = ordinary()
EXTREMES = {
    "far below any bias": replace(
        BASE, query=torch.full_like(BASE.query, -1e19), key=torch.full_like(BASE.key, 1e18), scale=1.0
    ),
    "overflow of products": replace(
        BASE, query=torch.full_like(BASE.query, -1e20), key=torch.full_like(BASE.key, 1e20)
    ),
    "huge queries": replace(BASE, query=BASE.query * 1e38),
    "huge queries, causal": replace(BASE, query=BASE.query * 1e38, is_causal=True),
    "huge keys, causal": replace(BASE, key=BASE.key * 1e38, is_causal=True),
    "far queries": replace(BASE, query=BASE.query * 1e9),
    "far queries, causal": replace(BASE, query=BASE.query * 1e9, is_causal=True),
    "far queries and keys": replace(BASE, query=BASE.query * 1e12, key=BASE.key * 1e12),
    "a column of 1e10": replace(BASE, attn_mask=column(1e10)),
    "a column of 1e10 that learns": replace(BASE, attn_mask=column(1e10), mask_grad=True),
    "a column of 3e38": replace(BASE, attn_mask=column(3e38)),
    "a column of inf": replace(BASE, attn_mask=column(INF)),
    "a column of NaN": replace(BASE, attn_mask=column(NAN)),
    "all biases at 1e10": replace(BASE, attn_mask=torch.full((70, 300), 1e10)),
    "all biases at -3e38": replace(BASE, attn_mask=torch.full((70, 300), -3e38)),
    "all biases at -inf": replace(BASE, attn_mask=torch.full((70, 300), -INF)),
    "rows of -inf": replace(BASE, attn_mask=torch.where(torch.arange(70)[:, None] % 3 > 0, 0.0, -INF).expand(70, 300)),
    "no key": replace(BASE, attn_mask=torch.zeros(70, 300, dtype=torch.bool)),
    "rows without a key and NaN in one": replace(
        BASE, attn_mask=(torch.arange(70) % 3 > 0)[:, None].expand(70, 300), query=with_one(BASE.query, NAN)
    ),
    "scale that float32 does not hold": replace(BASE, scale=1e-46),
    "scale that float32 does not hold, masked": replace(BASE, scale=1e-46, attn_mask=normal(70, 300, seed=9) > 0),
    "large scale": replace(BASE, scale=1e30),
    "scale that overflows": replace(BASE, scale=1e39),
    "no scale": replace(BASE, scale=0.0),
    "negative scale": replace(BASE, scale=-1e5),
    "negative scale, causal": replace(BASE, scale=-1.0, is_causal=True),
    "negative scale, causal, other strides": replace(BASE, scale=-1.0, is_causal=True, value=normal(1, 2, 16, 300).mT),
    "scale that float32 does not hold, causal, other strides": replace(
        BASE, scale=1e-46, is_causal=True, value=normal(1, 2, 16, 300).mT
    ),
    **{
        f"{value} in {name}{', causal' if causal else ''}": replace(
            BASE, **{name: with_one(getattr(BASE, name), value), "is_causal": causal}
        )
        for value in (NAN, INF, -INF, 1e38)
        for name in ("query", "key", "value", "grad")
        for causal in (False, True)
    },
    "NaN in a hidden key": replace(
        BASE, key=with_one(BASE.key, NAN, (0, 0, 299, 0)), attn_mask=(torch.arange(300) < 290).expand(70, 300)
    ),
    "inf in a hidden value": replace(
        BASE, value=with_one(BASE.value, INF, (0, 0, 299, 0)), attn_mask=(torch.arange(300) < 290).expand(70, 300)
    ),
    "inf in a later value": replace(
        ordinary(600, 600), is_causal=True, value=with_one(normal(1, 2, 600, 16), INF, (0, 0, 590, 0))
    ),
    "values of 1e38": replace(BASE, value=BASE.value.clamp(-3, 3) * 1e38),
    "values of 1e36": replace(BASE, value=BASE.value * 1e36),
    "gradients of 1e38": replace(BASE, grad=BASE.grad.clamp(-3, 3) * 1e38),
    "subnormal queries": replace(BASE, query=BASE.query * 1e-40),
    "subnormal values": replace(BASE, value=BASE.value * 1e-40),
    "subnormal all": replace(
        BASE, query=BASE.query * 1e-40, key=BASE.key * 1e-40, value=BASE.value * 1e-40, grad=BASE.grad * 1e-40
    ),
    "one key": ordinary(70, 1),
    "one key and huge": replace(ordinary(70, 1), query=normal(1, 2, 70, 16) * 1e38),
    "one row": replace(ordinary(1, 300), key=normal(1, 2, 300, 16) * 1e9),
    "float16 near its end": replace(ordinary(dtype=torch.float16), value=torch.full((1, 2, 300, 16), 6e4).half()),
    "bfloat16 near its end": replace(
        ordinary(dtype=torch.bfloat16), value=torch.full((1, 2, 300, 16), 3e38).bfloat16()
    ),
    "float64 near its end": replace(
        ordinary(dtype=torch.float64), query=normal(1, 2, 70, 16, dtype=torch.float64) * 1e308
    ),
    "other widths and NaN": replace(
        BASE, value=normal(1, 2, 300, 24), grad=normal(1, 2, 70, 24), query=with_one(BASE.query, NAN)
    ),
}


@pytest.mark.parametrize("c", [INF, 8.0, 1e-30, 1e30])
@pytest.mark.parametrize("name", EXTREMES)
def test_as_eager(name: str, c: float) -> None:
    check(EXTREMES[name], c)


@pytest.mark.parametrize("name", EXTREMES)
def test_as_eager_without_a_scale(name: str) -> None:
    """Whatever multiplies a scale of 0: the library's kernels read it in one place, and leave it out in another."""
    for c in (INF, 8.0):
        check(replace(EXTREMES[name], scale=0.0), c)


@pytest.mark.parametrize("other", ["query", "key", "value"])
def test_products_that_only_one_order_overflows(other: str) -> None:
    """Eager takes another kernel where the last dimension has a stride: the order of its products is ours too."""
    call = ordinary(2, 3, 8)
    small = {"query": with_one(call.query * 1e-38, 1e38, (0, 0, 0, 0)), "key": call.key * 5e-39}
    call = replace(call, **small, grad=call.grad * 7)
    call = replace(call, **{other: getattr(call, other).mT.contiguous().mT})
    for factor in torch.logspace(-1, 1, 40).tolist():  # somewhere one order overflows and the other does not
        check(replace(call, grad=call.grad * factor), INF)


@pytest.mark.parametrize("c", [INF, 8.0])
def test_a_nan_in_a_query_poisons_all_gradients(c: float) -> None:
    out, dq, dk, dv = EXTREMES["nan in query"].run(sus_attention, c=c, seed=0)
    assert out[0, 0, 3].isnan().all()
    assert dq[0, 0, 3].isnan().all()
    assert dk[0, 0].isnan().all()
    assert dv[0, 0].isnan().all()
    assert dv[0, 1].isfinite().all()  # the other head


@pytest.mark.parametrize("scale", [-1.0, 1e-46, 0.0])
@pytest.mark.parametrize("c", [INF, 8.0])
def test_causal_scales_of_which_the_library_makes_nan(scale: float, c: float) -> None:
    call = replace(BASE, scale=scale, is_causal=True)
    with sdpa_kernel(SDPBackend.MATH):
        exact = call.run(F.scaled_dot_product_attention, torch.float64)
    found = call.run(sus_attention, c=c, seed=0)
    torch.testing.assert_close(found[0].double(), exact[0], atol=1e-5, rtol=1e-4)
    assert all(x.isfinite().all() for x in found)


def test_overlapping_and_expanded_inputs() -> None:
    flat = normal(4000)
    q = flat.as_strided((1, 2, 70, 16), (0, 7, 1, 3))
    k = flat.as_strided((1, 2, 300, 16), (0, 0, 5, 1))
    v = normal(1, 1, 1, 16).expand(1, 2, 300, 16)
    grad = torch.ones(()).expand(1, 2, 70, 16)
    for c in (INF, 8.0):
        check(Call(q, k, v, grad), c)
        check(Call(q * 1e38, k, v, grad, is_causal=True), c)
        out = sus_attention(q, k, v, c=c, seed=0)  # as they are
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)


FAR = {
    # In float32, neighbours of 3e6 are 1/4 apart, so that these logits are exact.
    "positive": (lambda n: 3e6 + torch.arange(n) % 23 / 4, 24),
    "negative": (lambda n: -3e6 + torch.arange(n) % 23 / 4, 24),
    "ascending": (lambda n: 3e6 + torch.arange(n) * (6.0 / n) // 0.25 / 4, 24),
    "descending": (lambda n: 4e6 - torch.arange(n) * (6.0 / n) // 0.25 / 4, 24),
    # Maxima that are neighbours, but whose multiples by 1 / log 2 may be the same number.
    "neighbours": (
        lambda n: (torch.tensor(1.4e9).view(torch.int32) + torch.arange(n) // 64).int().view(torch.float32),
        1,
    ),
}


@pytest.mark.parametrize("n", [700, 8500])
@pytest.mark.parametrize("name", FAR)
def test_logits_far_from_zero(name: str, n: int) -> None:
    make, _ = FAR[name]
    problem = Case(m=30, n=n, heads=1, groups=1, biased="n", scale=0.25).problem()
    problem = replace(problem, query=torch.zeros_like(problem.query), attn_bias=make(n).float().view(1, 1, 1, n))
    expected = dense_attention(dense(problem))
    found = run(problem, 20.0, 5)
    torch.testing.assert_close(found.out.double(), expected, atol=2e-6, rtol=1e-4)
    weights = dense(problem).weights(dense(problem).logits())
    ours = kept_weights(problem, found.cache, 20.0, 5)
    chosen = ~ours.isnan()
    assert chosen.any()
    expected_weights = torch.maximum(weights, torch.tensor(1 / 20.0))  # W / min(1, c W)
    torch.testing.assert_close(ours[chosen], expected_weights[chosen], rtol=1e-3, atol=0)
    assert float((ours.nan_to_num(0.0).sum(-1) - 1).abs().max()) < 1.5  # about c points of 1 / c


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["nan", "inf", "huge", "huge value", "far"])
def test_features_with_extreme_numbers(name: str, kind: str) -> None:
    """Every feature of the op: NaN where a NaN went in, and finite numbers where nothing overflows."""
    case = replace(CASES[name], m=min(CASES[name].m, 40), batch=1)
    problem, grad = case.problem(), replace(case).grad()
    q, v, row = problem.query.clone(), problem.value.clone(), min(7, case.m - 1)
    far = 1e9 if q.dtype == torch.float32 else 1e4
    if kind in ("nan", "inf"):
        q[0, 0, row] = NAN if kind == "nan" else INF
    elif kind == "huge":
        q = (q.double().clamp(-1, 1) * torch.finfo(q.dtype).max).to(q.dtype)
    elif kind == "huge value":
        v = (v.double().clamp(-1, 1) * torch.finfo(v.dtype).max).to(v.dtype)
    else:
        q = q * far
    problem = replace(problem, query=q, value=v)
    learns = problem.attn_bias is not None
    for c in (8.0, INF):
        out, softmax, cache = dispatch.forward(problem, tensor(c), ZERO, ZERO)
        found = dispatch.backward(problem, Upstream(grad, out, softmax, cache, tensor(c), ZERO, ZERO, learns))
        if kind == "nan" and name != "one":  # of a single NaN, the library's kernel makes 0
            assert out[0, 0, row].isnan().all()
            assert found.query[0, 0, row].isnan().all()
            assert found.key[0, 0].isnan().any()
            assert found.value[0, 0].isnan().any()
            assert out[0, 0, :row].isfinite().all()
        if extreme.in_range(problem, grad, out) and q.dtype == torch.float32:
            for x in (out, found.query, found.key, found.value, found.attn_bias, found.sinks):
                assert x is None or x.isfinite().all()


@pytest.mark.parametrize("name", ["plain", "bias", "softcap", "sinks", "dropout", "window", "documents", "prefix"])
def test_exact_gradients_of_extreme_calls_are_those_of_the_tiled_path(name: str) -> None:
    """On ordinary numbers, where both may be asked."""
    problem, grad = CASES.get(name, Case()).problem(), CASES.get(name, Case()).grad()
    learns = problem.attn_bias is not None
    out, softmax, cache = dispatch.forward(problem, tensor(INF), ZERO, ZERO)
    expected = dispatch.backward(problem, Upstream(grad, out, softmax, cache, tensor(INF), ZERO, ZERO, learns))
    again, _ = extreme.forward(problem, ZERO)
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)
    found = extreme._gradients(problem, grad, ZERO, learns)
    for field in ("query", "key", "value", "attn_bias", "sinks"):
        ours, theirs = getattr(found, field), getattr(expected, field)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_extreme_calls_leave_no_cache_and_are_reported() -> None:
    problem = replace(Case().problem(), query=torch.full((1, 2, 64, 32), NAN))
    assert cpu.forward(problem, tensor(8.0), ZERO, ZERO) is None
    assert kept.unpack(cpu.sample(problem, tensor(8.0), ZERO, ZERO), problem, draw(problem, 8.0, 0)) is None


MAGNITUDES = [
    1e-38,
    1e-30,
    1e-20,
    1e-10,
    *[1.0] * 8,
    10.0,
    1e3,
    1e6,
    1e9,
    1e15,
    1e18,
    1e19,
    1e20,
    1e25,
    1e30,
    1e37,
    1e38,
]
SPECIAL = [None] * 8 + [INF, -INF, NAN, 1e38, -1e38, 1e-45]


@st.composite
def calls(draw: st.DrawFn) -> Call:
    seed = draw(st.integers(0, 1 << 30))
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.bfloat16, torch.float16, torch.float64]))
    b, h = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4]))
    g = draw(st.sampled_from([h, h, 1]))
    m, n = draw(st.sampled_from([1, 2, 5, 33, 100])), draw(st.sampled_from([1, 3, 17, 64, 100, 300]))
    d = draw(st.sampled_from([1, 8, 16, 33, 64]))
    e = draw(st.sampled_from([d, d, d, 24]))

    def make(shape: tuple[int, ...], number: int) -> Tensor:
        x = normal(*shape, seed=seed + number, dtype=torch.float64) * draw(st.sampled_from(MAGNITUDES))
        x = x.clamp(-3e38, 3e38).to(dtype)
        special = draw(st.sampled_from(SPECIAL))
        if special is not None:
            special = float(torch.tensor(special, dtype=torch.float64).to(dtype))
            kind = draw(st.sampled_from(["one", "one", "row", "all"]))
            place = draw(st.integers(0, 1 << 30))
            if kind == "all":
                x.fill_(special)
            elif kind == "row":
                x.view(-1, x.shape[-1])[place % (x.numel() // x.shape[-1])] = special
            else:
                x.view(-1)[place % x.numel()] = special
        return layout(x)

    def layout(x: Tensor) -> Tensor:
        kind = draw(st.sampled_from(["plain", "plain", "heads inside", "columns", "spaced", "one head"]))
        if x.dim() != 4 or kind == "plain":
            return x
        if kind == "heads inside":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "columns":
            return x.mT.contiguous().mT
        if kind == "one head":
            return x[:, :1].expand_as(x)
        return torch.cat([x, x], -1)[..., : x.shape[-1]]

    shapes = ((b, h, m, d), (b, g, n, d), (b, g, n, e), (b, h, m, e))
    call = Call(*(make(shape, i) for i, shape in enumerate(shapes)))
    scales = [None, None, None, 1.0, 1e-46, 1e-30, 1e-5, 30.0, 1e5, -1.0, 0.0]
    call = replace(call, scale=draw(st.sampled_from(scales if dtype == torch.float16 else [*scales, 1e20])))
    kind = draw(st.sampled_from(["none", "none", "causal", "bool", "float", "key"]))
    if kind == "causal":
        return replace(call, is_causal=True)
    size = draw(st.sampled_from([(m, n), (b, 1, m, n), (b, h, m, n), (1, h, 1, n), (b, 1, 1, n)]))
    if kind in ("bool", "key"):
        size = (b, 1, 1, n) if kind == "key" else size
        return replace(call, attn_mask=normal(*size, seed=seed + 9) > draw(st.sampled_from([-1.0, 0.0, 9.0])))
    if kind == "float":
        return replace(call, attn_mask=make(size, 5), mask_grad=draw(st.booleans()))
    return call


BUDGETS = st.sampled_from([8.0, INF, 30.0, 1e-30, 1e30, 1e-3, 5e-324, 1.7e308])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(), BUDGETS)
def test_random_calls(call: Call, c: float) -> None:
    check(call, c)


@pytest.mark.slow
@settings(max_examples=4000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls(), BUDGETS)
def test_many_random_calls(call: Call, c: float) -> None:
    check(call, c)
