"""The kernels in Triton's interpreter against the float64 reference.

`tests/ops/test_cuda.py` runs it in a process of its own.
"""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

from dataclasses import replace

import pytest
import torch

from fx_passes.ops import tiled
from fx_passes.ops.cuda import attention, launch
from fx_passes.ops.cuda.lists import c_limit
from fx_passes.ops.problem import Problem, Softmax
from fx_passes.ops.reference import sus_gradients
from fx_passes.ops.tiled.sample import row_offsets, systematic
from tests.ops.cuda.calls import (
    SEED,
    check,
    check_expectation,
    check_lost_lists,
    dense,
    error,
    kept_matrix,
    problem,
    run,
)
from tests.ops.cuda.features import HEAD_SIZES, features

NEEDED = interpreter.install()


@pytest.fixture(autouse=True)
def _fewer_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter's time is per operation, not per element.
    config = launch.config
    monkeypatch.setattr(launch, "_ROWS", 256)
    monkeypatch.setattr(launch, "config", lambda *sizes: replace(config(*sizes), bi=512))


def test_no_patch_of_the_interpreter_is_outdated() -> None:
    assert all(NEEDED.values()), f"remove the patches that are no longer needed: {NEEDED}"


FEATURES = features(96, 160)


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    check(problem(**FEATURES[name]), 8.0)


@pytest.mark.parametrize("c", [0.5, 6.0, 60.0])
def test_gradients_for_any_c(c: float) -> None:
    check(problem(m=40, n=96), c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(problem(dtype=dtype, static={"right": 0}), 8.0)


@pytest.mark.parametrize(("d", "e"), HEAD_SIZES)
def test_head_sizes(d: int, e: int) -> None:
    check(problem(d=d, e=e, m=70, n=130, h=1), 8.0)


def test_peaked_rows_keep_each_entry_once() -> None:
    check(problem(spread=6.0), 20.0)


def test_strides() -> None:
    p = problem()
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (p.query, p.key, p.value)]
    p = Problem(*swapped, *[None] * 6, static=p.static)
    r = run(p, 8.0, torch.ones(()).expand(1, 2, 96, 16))
    right = run(problem(), 8.0, torch.ones(1, 2, 96, 16))
    assert torch.equal(r["gradients"].key, right["gradients"].key)


def test_sinks_need_no_unit_stride() -> None:
    apart = torch.tensor([1.0, 9.0, -2.0, 9.0])
    right = run(problem(sinks=apart[::2].contiguous()), 8.0)["out"]
    assert torch.equal(run(problem(sinks=apart[::2]), 8.0)["out"], right)


def test_launches_are_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded: list[torch.Tensor] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: guarded.append(x) or guard(x))
    p = problem()
    run(p, 8.0)
    assert [x is p.query for x in guarded] == [True, True]


def test_rows_that_are_masked_at_a_finite_value_are_uniform() -> None:
    bias = torch.zeros(1, 1, 96, 160)
    bias[:, :, ::2] = -1e9
    bias[:, :, 1::4, :80] = torch.finfo(torch.float32).min
    p = problem(h=1, attn_bias=bias)
    p.query[:, :, ::2] = 0  # float32 has no room for a logit beside -1e9, the reference has
    r = check(p, 8.0)
    assert (r["key"][:, :, ::2] >= 0).sum(-1).double().mean() == pytest.approx(8, abs=0.2)


def kept_by_the_reference_path(p: Problem, c: float) -> torch.Tensor:
    weights = dense(p).weights(dense(p).logits())
    (b, h, m, n), flat = weights.shape, weights.flatten(0, 1).float()
    entries, _ = systematic(flat, c, row_offsets(SEED, 0, b * h, slice(0, m)), (launch.sizes_of(p).sub, 1))
    kept = torch.zeros(b * h, m, n, dtype=torch.int64)
    kept[entries.head, entries.row, entries.key] = 1
    return kept.view(b, h, m, n)


def test_the_set_is_the_one_of_the_reference_path() -> None:
    p, c = problem(h=4, g=2, static={"right": 0}, m=130, n=130), 10.0
    right = kept_by_the_reference_path(p, c)
    assert right.sum() > 3000
    # A boundary that float32 rounds to the other side of a point.
    assert (kept_matrix(p, run(p, c)["key"]) != right).sum() <= 4


@pytest.mark.slow
def test_expected_gradient_is_exact() -> None:
    check_expectation(problem(h=1, m=32, n=96, spread=2.0), 4.0)


def test_lost_lists_are_drawn_again() -> None:
    check_lost_lists(problem(static={"right": 0}), 8.0)


def test_infinite_c_is_exact() -> None:
    for p in (problem(static={"right": 0}), problem(sinks=torch.zeros(2))):
        r = run(p, torch.inf)
        right = sus_gradients(dense(p), r["grad"], torch.ones(1, 2, 96, 160))
        for name in ("query", "key", "value"):
            assert error(getattr(r["gradients"], name), right[name]) < 1e-5


def test_library_forward_keeps_its_bits() -> None:
    p = problem(static={"right": 0, "forward": "library"}, g=2, m=96, n=96)
    library = torch.nn.functional.scaled_dot_product_attention(p.query, p.key, p.value, is_causal=True)
    assert torch.equal(check(p, 8.0)["out"], library)


def test_forward_does_not_depend_on_c() -> None:
    p = problem()
    assert torch.equal(run(p, 8.0)["out"], run(p, torch.inf)["out"])


def test_c_beyond_the_lists_is_lowered_and_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a CUDA graph the capacity is frozen: a larger c on the device draws what fits, with weights to match."""
    p = problem()
    monkeypatch.setattr(attention, "_host_c", lambda *_: 4.0)
    r = run(p, 100.0)
    assert r["lists"].capacity == 5
    weights = dense(p).weights(dense(p).logits())
    matrix = kept_matrix(p, r["key"])
    full = kept_by_the_reference_path(p, c_limit(5))
    assert (full.sum(-1) == 5).double().mean() > 0.7  # lists that are full, and nothing is dropped from them
    assert (matrix != full).sum() <= 4
    right = sus_gradients(dense(p), r["grad"], matrix / (c_limit(5) * weights).clamp(max=1))
    assert error(r["gradients"].key, right["key"]) < 1e-4


def test_long_columns_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(m=160)
    whole = run(p, 8.0)
    monkeypatch.setattr(launch, "_SHORTEST", 64)
    monkeypatch.setattr(launch, "_LONG", 0)
    over, tile = launch.split_long(torch.tensor([0, 100, 100, 356]), 400, 64)
    assert (over.tolist(), tile.tolist()) == ([0, 1, 1, 4], [0, 2, 2, 2, -1, -1])
    split = run(p, 8.0)
    for name in ("query", "key", "value"):
        assert error(getattr(split["gradients"], name), getattr(whole["gradients"], name)) < 1e-6
    assert split["count"] == whole["count"]


def test_the_softmax_is_what_the_tiled_path_has() -> None:
    p = problem(sinks=torch.zeros(2), static={"left": 30, "right": 5})
    r = run(p, 8.0)
    _, other = tiled.forward(p, SEED)
    lse = [s.maximum + s.total.log() for s in (r["softmax"], other)]
    assert isinstance(r["softmax"], Softmax)
    assert error(*lse) < 1e-6
