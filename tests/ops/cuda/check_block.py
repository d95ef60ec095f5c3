"""The block sampler's kernels in Triton's interpreter. `tests/ops/test_cuda.py` runs it in a process of its own."""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

from collections.abc import Iterator

import pytest
import torch

from fx_passes.ops import tiled
from fx_passes.ops.cuda import attention, launch_block
from tests.ops.cuda.block_calls import check, problem
from tests.ops.cuda.calls import SEED, check_expectation, check_lost_lists, error, run
from tests.ops.cuda.features import HEAD_SIZES, features

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


FEATURES = features(150, 200)


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, fixed_order: bool) -> None:
    check(problem(**FEATURES[name]), 20.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(problem(dtype=dtype, static={"right": 0}), 20.0)


@pytest.mark.parametrize(("d", "e"), HEAD_SIZES)
def test_head_sizes(d: int, e: int) -> None:
    check(problem(d=d, e=e, m=70, n=130, h=1), 20.0)


def test_peaked_rows() -> None:
    check(problem(spread=6.0), 60.0)


def test_a_budget_beyond_all_keys_keeps_each_however_small_its_weight() -> None:
    p = problem(attn_bias=torch.linspace(0, -40, 160).view(1, 1, 1, 160), spread=0.1)
    assert (check(p, 170.0)["lists"].counts == 160).all()


def test_library_forward_keeps_its_bits() -> None:
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
    check_lost_lists(problem(static={"right": 0}), 20.0)


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
    check_expectation(problem(h=1, m=32, n=96, spread=2.0), 30.0)
