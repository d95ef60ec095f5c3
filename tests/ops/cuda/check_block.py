"""The block sampler's kernels in Triton's interpreter. `tests/ops/test_cuda.py` runs it in a process of its own."""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

from collections.abc import Iterator

import pytest
import torch

from fx_passes.ops import tiled
from fx_passes.ops.cuda import attention, launch_block
from fx_passes.ops.problem import Problem
from fx_passes.ops.reference import sus_gradients
from tests.ops.cuda.block_calls import check, problem
from tests.ops.cuda.calls import SEED, dense, error, run

interpreter.install()


@pytest.fixture(params=[False, True], ids=["atomics", "fixed"])
def fixed_order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Without and with deterministic algorithms, and then in several waves."""
    monkeypatch.setattr(launch_block, "_PARTIAL", 1 << 13)
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("c", [0.5, 20.0, 100.0, 500.0])
def test_any_budget(c: float) -> None:
    check(problem(m=100, n=200), c)


BAND = {"causal": {"right": 0}, "window": {"left": 40, "right": 0}, "end": {"right": 0, "bottom_right": True}}


@pytest.mark.parametrize("name", BAND)
def test_bands(name: str, fixed_order: bool) -> None:
    check(problem(m=150, n=200, static=BAND[name]), 20.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(problem(dtype=dtype, static={"right": 0}), 20.0)


@pytest.mark.parametrize(("d", "e"), [(16, 32), (40, 24), (256, 16)])
def test_head_sizes(d: int, e: int) -> None:
    check(problem(d=d, e=e, m=70, n=130, h=1), 20.0)


def test_groups_of_query_heads_in_a_batch(fixed_order: bool) -> None:
    check(problem(b=2, h=4, g=2, m=70, n=70, static={"right": 0}), 20.0)


def test_peaked_rows() -> None:
    check(problem(spread=6.0), 60.0)


def test_a_budget_beyond_all_keys_keeps_each_however_small_its_weight() -> None:
    p = problem(attn_bias=torch.linspace(0, -40, 160).view(1, 1, 1, 160), spread=0.1)
    assert (check(p, 170.0)["lists"].counts == 160).all()


def test_padding_and_blocks_that_see_nothing() -> None:
    mask = torch.rand(2, 1, 1, 130, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[1] = False
    r = check(problem(b=2, h=1, g=1, m=70, n=130, attn_mask=mask), 20.0)
    assert not r["lists"].counts[1].any()
    assert not r["gradients"].query[1].any()
    check(problem(m=70, n=130, static={"right": -80}), 20.0)  # the first block is before the band


def test_any_mask() -> None:
    mask = torch.rand(1, 2, 96, 160, generator=torch.Generator().manual_seed(0)) < 0.5
    check(problem(attn_mask=mask), 20.0)


@pytest.mark.parametrize("shape", [(1, 2, 96, 160), (1, 1, 1, 160), (1, 2, 96, 1)])
def test_bias_and_its_gradient(shape: tuple[int, ...], fixed_order: bool) -> None:
    check(problem(attn_bias=torch.randn(shape, generator=torch.Generator().manual_seed(0))), 20.0)


def test_sinks() -> None:
    check(problem(sinks=torch.tensor([1.0, -torch.inf])), 20.0)


def test_softcap() -> None:
    check(problem(spread=4.0, static={"softcap": 2.0}), 20.0)


def test_documents_and_prefix() -> None:
    ids = torch.arange(160)[None] // 50
    check(problem(m=160, query_ids=ids, key_ids=ids, prefix=torch.tensor([30]), static={"right": 0}), 20.0)


def test_dropout() -> None:
    check(problem(static={"dropout_p": 0.3, "site": 3}), 20.0)


def test_library_forward() -> None:
    p = problem(static={"right": 0, "forward": "library"}, g=2, m=96, n=96)
    library = torch.nn.functional.scaled_dot_product_attention(p.query, p.key, p.value, is_causal=True)
    assert torch.equal(check(p, 20.0)["out"], library)


@pytest.mark.parametrize("c", [30.0, 300.0, torch.inf])
def test_gradients_are_those_of_the_tiled_path(c: float) -> None:
    p = problem(h=4, g=2, m=150, n=200, static={"right": 0, "site": 5})
    r = run(p, c)
    number = torch.tensor(c, dtype=torch.float64)
    right, count = tiled.backward(p, r["grad"], r["out"], r["softmax"], number, SEED, SEED, False)
    if c < torch.inf:  # of an exact backward the library counts the band, the tiled path whole tiles
        assert abs(int(r["count"]) - count) <= 0.002 * count
    for name in ("query", "key", "value"):
        assert error(getattr(r["gradients"], name), getattr(right, name)) < 1e-3, name


def test_lost_lists_are_drawn_again() -> None:
    p = problem(static={"right": 0})
    r = run(p, 20.0)
    c = torch.tensor(20.0, dtype=torch.float64)
    again, count = attention.backward(p, r["grad"], r["out"], r["softmax"], r["kept"].clone(), c, SEED, SEED, False)
    assert count == r["count"]
    assert torch.equal(again.query, r["gradients"].query)


def test_a_fixed_order_gives_the_same_bits_and_atomics_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(h=4, g=1, m=150, n=100, static={"right": 0})
    atomics = run(p, 20.0)["gradients"]
    torch.use_deterministic_algorithms(True)
    try:
        fixed = []
        for size in (1 << 13, 1 << 13, 1 << 28):
            monkeypatch.setattr(launch_block, "_PARTIAL", size)
            fixed.append(run(p, 20.0)["gradients"])
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("query", "key", "value"):
        first, second, one_wave = (getattr(g, name) for g in fixed)
        assert torch.equal(first, second), name
        assert error(one_wave, first) < 1e-6, name
        assert error(getattr(atomics, name), first) < 1e-6, name


def test_c_beyond_the_lists_is_lowered_and_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem()
    monkeypatch.setattr(attention, "_host_c", lambda *_: 12.0)
    r = run(p, 100.0)
    assert r["lists"].capacity == 13
    assert (r["lists"].counts <= 13).all()
    monkeypatch.setattr("tests.ops.cuda.block_calls.run", lambda p, c: r)
    check(p, float(attention.c_limit(13)))


@pytest.mark.slow
def test_expected_gradient_is_exact() -> None:
    """256 heads with equal contents draw independently: their mean is within the error that their spread predicts."""
    p = problem(h=1, m=32, n=96, spread=2.0)
    heads = 256
    wide = Problem(*(x.expand(-1, heads, -1, -1) for x in (p.query, p.key, p.value)), *[None] * 6, static=p.static)
    grad = torch.randn(1, 1, 32, 16, generator=torch.Generator().manual_seed(1))
    r = run(wide, 30.0, grad.expand(1, heads, 32, 16))
    exact = sus_gradients(dense(p), grad, torch.ones(1, 1, 32, 96))
    for name in ("query", "key", "value"):
        samples = getattr(r["gradients"], name)[0].double()
        noise = samples.var(0).sum().div(heads).sqrt()
        assert (samples.mean(0) - exact[name][0, 0]).norm() < 1.3 * noise, name
        assert noise < 0.3 * exact[name].norm()
