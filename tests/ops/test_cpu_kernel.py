"""The native CPU kernel against the float64 oracle, the library and the tiled path."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fx_passes import sus_attention
from fx_passes.ops import cpu
from fx_passes.ops.cpu import bind
from fx_passes.ops.draws import row_words
from fx_passes.ops.reference import dense_attention, sus_gradients
from fx_passes.ops.tiled.sample import LANES, ONE, STEPS, systematic
from fx_passes.ops.tiled.tiles import CHUNK
from tests.ops.cpu_cases import (
    CASES,
    Case,
    Run,
    dense,
    dropout_factor,
    gradients,
    kept_weights,
    run,
)

pytestmark = pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")

BUDGETS = [0.3, 1.0, 8.0, 5000.0]

UNIT = 2.0**-24  # float32 rounds a number by at most this much of it
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of results, beside float32's


def logit_error(problem) -> float:
    """Bound of the error of a logit, hence relative of a weight, of an output and absolute of a logsumexp.

    A logit is a sum of d products in float32. Each of its d partial sums is rounded by at most UNIT * |partial sum|,
    with signs that have nothing to do with each other, and no partial sum is much above the largest logit: one logit
    has an error of sqrt(d / 3) * UNIT * max|S| (standard deviation), and an output is off by at most twice the largest
    error of its row times its mean |v| (below 1). The measured errors of outputs and logsumexps are up to half of
    what is returned. The 4 is for the roundings of the exponential, the sum, the inverse and the product.
    """
    logits = dense(problem).logits()
    seen = logits[logits > -5000]  # not what a finite mask hides
    largest = float(seen.abs().max()) if seen.numel() else 0.0
    return UNIT * (4 + math.sqrt(problem.query.shape[-1]) * largest)


def check_forward(problem, out: torch.Tensor) -> None:
    error = logit_error(problem) / (1 - problem.static.dropout_p)
    rounding = ROUNDING[problem.query.dtype]  # of the output itself
    expected = dense_attention(dense(problem), dropout_factor(problem))
    torch.testing.assert_close(out.double(), expected, atol=error, rtol=error + rounding)


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str) -> None:
    problem = CASES[name].problem()
    assert cpu.supports(problem)
    found = run(problem, math.inf, 0)
    exact = dense(problem)
    check_forward(problem, found.out)
    lse = exact.logits().logsumexp(-1)
    if problem.sinks is not None:
        lse = torch.logaddexp(lse, problem.sinks.double()[:, None])
    seen = lse > -math.inf
    ours = found.softmax.maximum.double() + found.softmax.total.double().log()
    torch.testing.assert_close(ours[seen], lse[seen], atol=logit_error(problem), rtol=0)
    assert (found.softmax.maximum[~seen] == 0).all()
    assert (found.softmax.total[~seen] == 1).all()
    assert (found.out.transpose(1, 2)[~seen.transpose(1, 2)] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_forward_error_is_not_above_the_library(causal: bool, dtype: torch.dtype, d: int) -> None:
    ours = theirs = 0.0
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 4, 700, d, generator=g).to(dtype) for _ in range(3))
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
        ours += float((sus_attention(q, k, v, is_causal=causal) - exact).norm())
        theirs += float((F.scaled_dot_product_attention(q, k, v, is_causal=causal) - exact).norm())
    # 2%: in bfloat16 both are the rounding of the output and little else.
    assert ours <= 1.02 * theirs


@pytest.mark.parametrize("name", ["causal 257", "gqa", "padding", "bfloat16", "dropout", "long dropout"])
def test_forward_bits_do_not_depend_on_c(name: str) -> None:
    problem = CASES[name].problem()
    first = run(problem, math.inf, 0)
    for other in (run(problem, 8.0, 1), run(problem, 500.0, 2), run(CASES[name].problem(sample=False), 8.0, 1)):
        assert torch.equal(first.out, other.out)
        assert torch.equal(first.softmax.maximum, other.softmax.maximum)
        assert torch.equal(first.softmax.total, other.softmax.total)


def tiled_weights(problem, softmax, c: float, seed: int) -> torch.Tensor:
    """Kept weights by the definition, `tiled.sample.systematic`, from the oracle's logits in float32."""
    b, h, m, _ = problem.query.shape
    w = (dense(problem).logits().float() - softmax.maximum[..., None]).exp() / softmax.total[..., None]
    heads = torch.arange(b * h)[:, None]
    phase = row_words(torch.tensor(seed), problem.static.site, heads, torch.arange(m))
    entries, _ = systematic(w.flatten(0, 1), c, phase)
    table = torch.full_like(w, torch.nan, dtype=torch.float64).flatten(0, 1)
    table[entries.head, entries.row, entries.key] = entries.weight.double()
    return table.view(b, h, m, -1)


def border_distance(problem, c: float, seed: int) -> torch.Tensor:
    """How far each entry's interval on the row's cumulative c * W has a border from the next point, [B, H, M, N]."""
    exact = dense(problem)
    w = exact.weights(exact.logits())
    b, h, m, n = w.shape
    tiles = F.pad(w, (0, -n % CHUNK)).view(b, h, m, -1, STEPS, LANES).transpose(-1, -2)
    ends = tiles.flatten(3).cumsum(-1).view(tiles.shape).transpose(-1, -2).flatten(3)[..., :n]
    offset = row_words(torch.tensor(seed), problem.static.site, torch.arange(b * h)[:, None], torch.arange(m))
    places = torch.stack([ends, ends - w]) * c + (offset / ONE).view(b, h, m, 1)
    return (places - places.round()).abs().amin(0)


def check_kept(problem, found: Run, c: float, seed: int) -> None:
    """The kept entries are those of the definition, but for points on a border, where rounding decides."""
    signed = kept_weights(problem, found.cache, c, seed)
    factor = dropout_factor(problem)
    assert torch.equal(signed < 0, ~signed.isnan() & (factor == 0 if factor is not None else torch.tensor(False)))
    ours = signed.abs()
    theirs = tiled_weights(problem, found.softmax, c, seed)
    differ = ours.isnan() != theirs.isnan()
    # Cumulative W is off by at most the weights' relative error, and each sub-tile is cut to a multiple of 2^-32.
    n = ours.shape[-1]
    assert (border_distance(problem, c, seed)[differ] <= c * logit_error(problem) + n / ONE).all()
    # Rounding moves a point across one of the `visible` borders with probability c * dC, where dC is the error of
    # cumulative W there; that entry is then lost and another one gained. dC is far below logit_error, since the
    # weights' errors average out: measured 2 c dC is up to 6 units per border where entries are many (9 for 14 rows of
    # d = 139). Points that cross are rare and few: their number is Poisson's, so it has room of 5 deviations.
    visible = int(dense(problem).visible().expand_as(ours).sum())
    crossing = 6 * UNIT * c * visible
    assert int(differ.sum()) <= 2 * (2 + crossing + 5 * math.sqrt(crossing))
    assert not (~ours.isnan() & ~dense(problem).visible()).any()
    assert ((~ours.isnan()).sum(-1) <= math.ceil(c) + 1).all()
    both = ~ours.isnan() & ~theirs.isnan()
    # A kept weight is W / q, where q is cut to a multiple of 2^-32 twice.
    exact = dense(problem)
    q = (exact.weights(exact.logits()) / theirs).clamp(max=1)[both]
    error = (ours[both] / theirs[both] - 1).abs()
    assert (error <= 2 * logit_error(problem) + 2 / ONE / q).all()


@pytest.mark.parametrize("c", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_keeps_what_the_definition_keeps(name: str, c: float) -> None:
    problem = CASES[name].problem(site=5)
    seed = -123456789012345
    found = run(problem, c, seed)
    check_kept(problem, found, c, seed)


@pytest.mark.parametrize("c", [float(1 << 17), float(1 << 18), float(1 << 30)])
@pytest.mark.parametrize("name", ["causal 257", "long"])
def test_budgets_beyond_all_keys(name: str, c: float) -> None:
    """From 2^18 on, a row's units are more than the mantissa of a float64 has room for."""
    problem = CASES[name].problem()
    found = run(problem, c, 9)
    found_weights = kept_weights(problem, found.cache, c, 9)
    exact = dense(problem)
    w = exact.weights(exact.logits())
    sure = w * c > 1.01
    error = (found_weights / w - 1).abs()[sure]
    assert bool(sure.any())
    assert bool((error <= 2 * logit_error(problem)).all())  # q = 1, and NaN where an entry is missing


@pytest.mark.parametrize("c", BUDGETS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_the_kept_entries(name: str, c: float) -> None:
    case = CASES[name]
    problem, grad = case.problem(), case.grad()
    found = run(problem, c, 3)
    weights = kept_weights(problem, found.cache, c, 3).nan_to_num(0.0).abs()
    exact = dense(problem)
    w = exact.weights(exact.logits())
    # The oracle multiplies W by m = kept weight / W. An underflowed W is kept with probability 0.
    multiplier = torch.where(weights > 0, weights / w.clamp(min=1e-30), 0.0)
    expected = sus_gradients(exact, grad, multiplier, dropout_factor(problem))
    result, count = gradients(problem, grad, found, c, 3)
    assert count == int((weights > 0).sum())
    # Norms of errors: those of k additions and of dot products of d numbers grow as sqrt(k) and sqrt(d), and
    # k, d <= 1000 make 32 units, about 2e-6 (measured: 1e-6). In bfloat16 the gradients are rounded to 8 bits, as is
    # the output that delta is made of: 2^-8 at most (measured: 2e-3); in float16 to 11.
    tolerance = max(ROUNDING[problem.query.dtype], 32 * UNIT)
    for key, x in expected.items():
        ours = getattr(result, key).double()
        assert ours.is_contiguous()
        if x.norm() > 1e-6:  # one key: W = 1 and the logits have no gradient
            assert float((ours - x).norm() / x.norm()) < tolerance, key
        else:
            assert float(ours.norm()) < 1e-5


@pytest.mark.parametrize("shape", list(itertools.product((1, 2), (1, 4), (1, 150), (1, 300))))
def test_gradient_of_a_bias_is_added_up_where_it_is_broadcast(shape: tuple[int, ...]) -> None:
    case = Case(batch=2, heads=4, groups=2, m=150, n=300, right=0, bottom_right=True)
    found = []
    for size in (shape, (2, 4, 150, 300)):
        problem = replace(case.problem(), attn_bias=torch.full(size, 0.5))
        result, _ = gradients(problem, case.grad(), run(problem, 9.0, 4), 9.0, 4)
        assert result.attn_bias.shape == size
        found.append(result.attn_bias.double())
    added, full = found
    k = full.numel() / added.numel()  # the roundings of k additions have signs of their own
    error = (added - full.sum_to_size(shape)).abs()
    assert (error <= UNIT * 4 * math.sqrt(k) * full.abs().sum_to_size(shape)).all()


@pytest.mark.parametrize(("dropout", "biased"), [(0.0, ""), (0.3, "hn")])
def test_mean_over_seeds_is_the_exact_gradient(dropout: float, biased: str) -> None:
    case = replace(CASES["gqa"], batch=1, heads=4, groups=2, m=96, n=96, dropout=dropout, biased=biased)
    problem, grad = case.problem(), case.grad()
    exact = sus_gradients(dense(problem), grad, torch.ones(1, 4, 96, 96), dropout_factor(problem))
    draws: dict[str, list[torch.Tensor]] = {key: [] for key in exact}
    number = 600
    for seed in range(number):
        found = run(problem, 6.0, seed)
        result, _ = gradients(problem, grad, found, 6.0, seed)
        for key, values in draws.items():
            values.append(getattr(result, key).double())
    for key, values in draws.items():
        stack = torch.stack(values)
        error = stack.std(0) / math.sqrt(number)
        z = ((stack.mean(0) - exact[key]) / error.clamp(min=1e-6)).square().mean()
        assert 0.8 < float(z) < 1.2, key  # squares of standard normal numbers


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    causal = data.draw(st.booleans())
    case = Case(
        batch=data.draw(st.integers(1, 2)),
        heads=groups * data.draw(st.integers(1, 3)),
        groups=groups,
        m=data.draw(st.integers(1, 300)),
        n=(n := data.draw(st.integers(1, 600))),
        d=data.draw(st.integers(1, 140)),
        e=data.draw(st.integers(1, 140)),
        right=data.draw(st.integers(-3, 3)) if causal else None,
        bottom_right=data.draw(st.booleans()),
        padded=data.draw(st.none() | st.integers(0, n)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        dropout=data.draw(st.just(0.0) | st.floats(0.0, 0.9)),
    )
    problem, grad = case.problem(), case.grad()
    c, seed = data.draw(st.floats(0.05, 700)), data.draw(st.integers(-(1 << 63), (1 << 63) - 1))
    found = run(problem, c, seed)
    check_forward(problem, found.out)
    check_kept(problem, found, c, seed)
    result, _ = gradients(problem, grad, found, c, seed)
    assert all(bool(x.isfinite().all()) for x in (result.query, result.key, result.value))


def test_a_prefix_for_all_batch_entries() -> None:
    problem = CASES["prefix"].problem()
    one, each = (run(replace(problem, prefix=torch.full((size,), 50)), 8.0, 0) for size in (1, 3))
    assert torch.equal(one.out, each.out)


def test_large_logits_and_rows_of_one_key() -> None:
    problem = replace(CASES["causal 257"].problem(), static=replace(CASES["causal 257"].problem().static, scale=300.0))
    found = run(problem, 8.0, 0)
    check_forward(problem, found.out)


@pytest.mark.parametrize("width", [256, 4])  # whole vectors, and what is left of one
def test_every_float16_is_read_and_written(width: int) -> None:
    """A row of one key gives its value, times 1 / (1 - p) where it is not dropped; one of two gives their mean."""
    v = torch.arange(1 << 16).to(torch.uint16).view(torch.float16).view(-1, 1, 1, width)
    q = torch.zeros(len(v), 1, 1, 16, dtype=torch.float16)
    torch.testing.assert_close(sus_attention(q, q, v), v, rtol=0, atol=0, equal_nan=True)
    twice = sus_attention(q, q, v, dropout_p=0.5)
    kept = ((twice != 0) & v.isfinite()).any(-1, keepdim=True)
    assert 0 < int(kept.sum()) < len(v)
    expected = (2 * v.float()).half()  # large ones become infinite
    torch.testing.assert_close(twice.where(kept, 0), expected.where(kept, 0), rtol=0, atol=0, equal_nan=True)
    pair = torch.cat([v, v[torch.randperm(len(v))]], 2)
    expected = ((pair[:, :, :1].float() + pair[:, :, 1:].float()) / 2).half()
    torch.testing.assert_close(
        sus_attention(q, torch.zeros(len(v), 1, 2, 16).half(), pair), expected, rtol=0, atol=0, equal_nan=True
    )


def test_not_a_number_is_not_hidden() -> None:
    q, k, v = (torch.randn(1, 1, 300, 32, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        q[0, 0, 5, 3] = torch.nan
    out = sus_attention(q, k, v, c=4)
    assert bool(out[0, 0, 5].isnan().all())
    assert bool(out[0, 0, 6].isfinite().all())
    out.sum().backward()
    assert bool(q.grad[0, 0, 5].isnan().all())


def test_strides_that_are_no_unit() -> None:
    q, k, v = (torch.randn(1, 2, 32, 70).transpose(2, 3) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sus_attention(q, k, v), expected)
    wide = torch.randn(1, 2, 70, 1).expand(1, 2, 70, 32)  # a gradient of stride 0
    q.requires_grad_()
    out = sus_attention(q, k, v, c=5, seed=1)
    first = torch.autograd.grad(out, q, wide, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out, q, wide.contiguous())[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bits_repeat_for_a_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    # Two tiles.
    case = Case(heads=3, groups=3, m=700, n=1500, d=64, e=64, right=0, bottom_right=True, dropout=0.1, biased="n")
    problem, grad = case.problem(), case.grad()
    try:
        runs = []
        for number in (1, *(threads,) * 6):
            torch.set_num_threads(number)
            found = run(problem, 20.0, 7)
            result, _ = gradients(problem, grad, found, 20.0, 7)
            runs.append((found.out, result.query, result.key, result.value, result.attn_bias))
        for other in runs[2:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[1], other, strict=True))
        # With 2 threads and 3 heads, each head is cut into slices whose shares of dK and dV are added up.
        assert all(float((a - b).norm() / a.norm()) < 32 * UNIT for a, b in zip(runs[0], runs[1], strict=True))
    finally:
        torch.set_num_threads(before)
