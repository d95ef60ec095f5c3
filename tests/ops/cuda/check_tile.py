"""The kernels of the sampler "tile" in Triton's interpreter. `tests/ops/test_cuda.py` runs it in its own process."""

from __future__ import annotations

from tests.ops.cuda import interpreter  # isort: skip  (first: it sets TRITON_INTERPRET)

import pytest
import torch

from fx_passes.ops import tile_rule
from fx_passes.ops.cuda import attention, launch_tile
from fx_passes.ops.reference import sus_gradients
from tests.ops.cuda.calls import dense, error
from tests.ops.cuda.features import HEAD_SIZES, features
from tests.ops.cuda.tile_calls import NAMES, check, check_expectation, drawn, problem, run

interpreter.install()

FEATURES = features(150, 330)
C = 1.5


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str) -> None:
    check(problem(**FEATURES[name]), C)


@pytest.mark.parametrize("c", [0.2, 20.0])
def test_gradients_for_any_c(c: float) -> None:
    check(problem(m=100, n=260), c)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    check(problem(m=150, n=150, dtype=dtype, static={"right": 0}), C)


@pytest.mark.parametrize(("d", "e"), HEAD_SIZES)
def test_head_sizes(d: int, e: int) -> None:
    check(problem(d=d, e=e, m=70, n=130, h=1), C)


def test_batches_groups_and_sites() -> None:
    check(problem(b=2, h=6, g=2, m=200, n=200, static={"right": 0, "site": 3, "dropout_p": 0.2}), C)


@pytest.mark.parametrize("shape", [(1, 1, 150, 200), (2, 1, 150, 200), (1, 2, 1, 200), (2, 2, 150, 1), (1, 1, 1, 1)])
def test_gradient_of_a_bias(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    check(problem(b=2, h=2, g=1, m=150, n=200, attn_bias=bias), C)


def test_packed_documents_sweep_their_own_tiles() -> None:
    ids = (torch.arange(320) // 100)[None]
    p = problem(m=320, n=320, query_ids=ids, key_ids=ids, static={"right": 0})
    r = check(p, 50.0)  # all that a block looks at
    mine, _ = drawn(p, r["tiles"])
    inside = [[bool((ids[0, 64 * t : 64 * t + 64, None] == ids[0, None, 64 * s : 64 * s + 64]).any()) and t <= s
               for t in range(5)] for s in range(5)]  # fmt: skip
    assert torch.equal(mine[0, 0], torch.tensor(inside))


def test_infinite_c_is_exact() -> None:
    for p in (
        problem(static={"right": 0}),
        problem(sinks=torch.zeros(2)),
        problem(attn_bias=torch.zeros(1, 1, 96, 160)),
    ):
        r = run(p, torch.inf)
        right = sus_gradients(dense(p), r["grad"], torch.ones(1, 2, 96, 160))
        for name in NAMES[:3]:
            assert error(getattr(r["gradients"], name), right[name]) < 1e-5


def test_popular_tiles_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(b=2, h=4, g=1, m=400, n=200)
    whole = run(p, 3.0)
    monkeypatch.setattr(launch_tile, "_SHORTEST", 2)
    split = run(p, 3.0)
    for name in NAMES[:3]:
        assert error(getattr(split["gradients"], name), getattr(whole["gradients"], name)) < 1e-6
    assert split["count"] == whole["count"]


def test_c_beyond_the_lists_is_lowered_and_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a CUDA graph the capacity is frozen: a larger c on the device draws what fits, with weights to match."""
    p = problem(m=128, n=1600)
    monkeypatch.setattr(attention, "_host_c", lambda *_: 1.0)
    r = run(p, 100.0)
    capacity = r["tiles"].tile.shape[3]
    assert capacity == tile_rule.capacity_for(1.0, 1600) < 25
    monkeypatch.setattr("tests.ops.cuda.tile_calls.run", lambda p, c: r)
    check(p, tile_rule.c_limit(capacity, 1600))


def test_lists_hold_the_most_that_can_be_drawn() -> None:
    """Each probed row has a tile of its own: the s of a block sum to sqrt(PROBED), all that Cauchy-Schwarz allows."""
    p = problem(h=1, m=64, n=64 * 64, d=64, e=16)
    p.key.zero_()
    p.query.zero_()
    for row in range(64):
        p.key[0, 0, 64 * row, row] = 1000.0
        p.query[0, 0, row, row] = 10.0
    for c in (0.9, 1.7, 2.2):
        r = run(p, c)
        assert int(r["tiles"].counts.max()) <= r["tiles"].tile.shape[3] < 64
        total = c * (tile_rule.PROBED**0.5 + tile_rule.FLOOR)
        assert abs(int(r["tiles"].counts[0, 0, 0]) - total) <= 1


def test_not_a_number_is_seen_in_every_gradient() -> None:
    p = problem(m=200, n=200, static={"right": 0})
    p.query[0, 1, 77] = torch.nan
    r = run(p, 0.5)
    assert r["gradients"].query[0, 1, 77].isnan().all()
    assert r["gradients"].key[0, 0].isnan().any()
    assert r["gradients"].value[0, 0].isnan().any()


@pytest.mark.slow
def test_expected_gradient_is_exact() -> None:
    check_expectation(problem(h=1, m=64, n=640, spread=2.0), 5.0)
