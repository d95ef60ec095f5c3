"""AutoC on landscapes whose optimum is known: no training, no Lightning."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from landscapes import World, random_world

from sus_lightning import AutoC
from sus_lightning.landscape import Landscape, Pass, Probed, penalty

# A third of the time is attention's backward, whose entries cost as much as dense ones; 10% of variance at c = 30.
USUAL = World(rest=0.65, per_entry=4e-4, at_one=16.0, slope=1.5, noise_scale=5.0, keys=1024.0)


def run(world: World, probes: int = 20, schedule: AutoC | None = None) -> tuple[AutoC, list[float]]:
    schedule = schedule or AutoC()
    path = [schedule(0)]
    for step in range(probes):
        schedule.observe(world.probe(schedule(step), schedule.measure_at()))
        path.append(schedule(step))
    return schedule, path


def loss(world: World, schedule: AutoC, c: float) -> float:
    """Of progress per second against the best c, as a logarithm."""
    return world.cost(c) - world.cost(world.best(schedule.minimum, schedule.maximum))


def turns(path: list[float]) -> int:
    """How often c changes its direction; infinity is above all."""
    moves = [a < b for a, b in pairwise(path) if a != b]
    return sum(a != b for a, b in pairwise(moves))


def test_penalty() -> None:
    """Steps grow as 1 + x, and r raises x to x (1 + r)."""
    for r, x in ((0.1, 0.5), (0.02, 30.0)):
        assert penalty(r, x) == pytest.approx((1 + x * (1 + r)) / (1 + x))
    assert penalty(0.1, math.inf) == penalty(0.1, math.nan) == penalty(0.1, -2.0) == 1.1


SEEDS = [range(12), pytest.param(range(12, 150), marks=pytest.mark.slow)]


@pytest.mark.parametrize("seeds", SEEDS, ids=["few", "many"])
def test_random_landscapes_without_noise_end_within_5_percent_of_the_best(seeds: range) -> None:
    for seed in seeds:
        world = random_world(seed, says_kept=bool(seed % 2))
        schedule, path = run(world)
        assert loss(world, schedule, path[-1]) < 0.05, (seed, path)
        assert turns(path[3:]) <= 1, (seed, path)


@pytest.mark.parametrize("seeds", SEEDS, ids=["few", "many"])
def test_random_landscapes_with_30_percent_noise(seeds: range) -> None:
    """Of both timing and variance, and one pass in fifty that takes ten times as long."""
    losses, moves = [], []
    for seed in seeds:
        world = random_world(seed, timing_noise=0.3, variance_noise=0.3, outliers=0.02)
        schedule, path = run(world)
        losses.append(loss(world, schedule, path[-1]))
        moves.append(sum(a != b for a, b in pairwise(path[10:])))
        assert turns(path) <= 8, (seed, path)
        assert turns(path[10:]) <= 3, (seed, path)
    assert sum(x < 0.05 for x in losses) >= 0.95 * len(losses), sorted(losses)[-5:]
    assert max(losses) < 0.15
    assert sum(moves) / len(moves) < 0.5  # in the last ten probes


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    share=st.floats(0.0, 0.9),
    entry=st.floats(0.1, 10.0),
    sampling=st.floats(0.0, 0.5),
    variance=st.floats(1e-5, 1.0),
    slope=st.floats(0.5, 2.5),
    noise_scale=st.one_of(st.floats(1e-3, 1e3), st.just(math.inf)),
    keys=st.floats(64, 1e5),
    dense=st.floats(0.05, 1.0),
    growth=st.floats(0.5, 1.0),
)
def test_any_landscape(
    share: float,
    entry: float,
    sampling: float,
    variance: float,
    slope: float,
    noise_scale: float,
    keys: float,
    dense: float,
    growth: float,
) -> None:
    per_entry = entry * share / keys
    world = World(1 - share + sampling, per_entry, variance * 30**slope, slope, noise_scale, keys, growth, dense * keys)
    schedule, path = run(world)
    assert loss(world, schedule, path[-1]) < 0.05, path
    finite = [c for c in path if not math.isinf(c)]
    assert all(schedule.minimum <= c <= schedule.maximum for c in finite)
    assert all(1 / 4 - 1e-6 <= b / a <= 4 + 1e-6 for a, b in pairwise(finite))


def test_it_comes_down_from_a_plateau_by_bounded_steps() -> None:
    """On a GPU the exact backward runs where SUS would keep most: time says nothing there."""
    for says_kept in (True, False):
        world = replace(USUAL, dense_from=40.0, says_kept=says_kept)
        schedule, path = run(world)
        assert path[0] == 256
        assert path[1] >= 64
        assert path[-1] < 40
        assert loss(world, schedule, path[-1]) < 0.04


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_where_sus_gains_nothing_it_settles_at_infinity_and_says_so(noise: float) -> None:
    world = replace(USUAL, rest=1.02, per_entry=1e-4, timing_noise=noise, variance_noise=noise)
    schedule, path = run(world)
    assert math.isinf(path[-1])
    assert schedule.gains_nothing
    assert "SUS would not speed this model up at n = 512: at c" in schedule.verdict(512, 0.4)
    assert schedule.verdict(512, 0.03) == (
        "SUS would not speed this model up at n = 512: attention's backward is 3% of a step"
    )
    helped, _ = run(USUAL)
    assert not helped.gains_nothing


def test_where_everything_is_kept_a_gain_has_to_be_shown() -> None:
    """A short input under the sampler "tile": noise of the clock is no gain, but another kernel may have one."""
    everything = World(rest=1.0, per_entry=0.0, at_one=0.0, slope=1.5, noise_scale=1.0, keys=8.0, timing_noise=0.15)
    for seed in range(8):
        _, path = run(replace(everything, seed=seed), 6)
        assert sum(math.isinf(c) for c in path[1:]) >= 5, path
    _, path = run(replace(everything, rest=0.5), 6)
    assert all(map(math.isfinite, path))


def test_it_comes_back_from_infinity() -> None:
    """The input became longer: SUS pays now."""
    schedule, path = run(replace(USUAL, rest=1.1))
    assert math.isinf(path[-1])
    assert schedule.measure_at()  # it goes on to look
    schedule, path = run(USUAL, 40, schedule)
    assert loss(USUAL, schedule, path[-1]) < 0.05


def test_a_drift_of_the_variance_is_followed() -> None:
    schedule, path = run(replace(USUAL, at_one=1.0))
    sharper = replace(USUAL, at_one=100.0)
    later, moved = run(sharper, 20, schedule)
    assert moved[-1] > 2 * path[-1]
    assert loss(sharper, later, moved[-1]) < 0.05


def test_an_unknown_noise_scale_is_taken_as_infinite() -> None:
    known = run(replace(USUAL, noise_scale=0.05))[1][-1]
    unknown = run(replace(USUAL, noise_scale=math.inf))[1][-1]
    assert unknown > known
    landscape = Landscape([Probed((Pass(64.0, 0.1, 0.5),), 1.0, -0.3)], 64.0)
    assert landscape.at(64.0).log_penalty == pytest.approx(math.log(1.1), rel=1e-6)


def test_on_worst_takes_the_worst_kind() -> None:
    def measured(world: World, c: float, others: list[float]) -> dict[str, float]:
        values = world.probe(c, others)
        for name in ("", *(f"at/{at!r}/" for at in others)):
            values[name + "worst_relative_variance"] = 6 * values[name + "sus_variance"] / values["batch_variance"]
        return values

    total, worst = AutoC(), AutoC(on="worst")
    for schedule in (total, worst):
        for step in range(20):
            schedule.observe(measured(USUAL, schedule(step), schedule.measure_at()))
    assert worst(0) > total(0)
    assert loss(replace(USUAL, at_one=6 * USUAL.at_one), worst, worst(0)) < 0.02


def test_its_state_goes_on_to_the_bit() -> None:
    whole, _ = run(replace(USUAL, timing_noise=0.3, variance_noise=0.3), 12)
    world = replace(USUAL, timing_noise=0.3, variance_noise=0.3)
    first, _ = run(world, 5)
    second = AutoC()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.measure_at() == first.measure_at()
    run(world, 7, second)
    assert second.state_dict() == whole.state_dict()


def test_per_layer_gives_the_noisier_module_more() -> None:
    schedule = AutoC(per="layer")
    noise = {"a": 100.0, "b": 1.0}
    for _ in range(10):
        c = {name: schedule.c_of(name) for name in noise}
        alone = {f"sus_variance_alone/{n}": noise[n] * c[n] ** -1.5 for n in schedule.measure(list(noise))}
        values = {"sus_variance": sum(noise[n] * c[n] ** -1.5 for n in noise), "batch_variance": 1.0}
        for other in schedule.measure_at():
            at = {n: schedule.c_of(n, other) for n in noise}
            values[f"at/{other!r}/sus_variance"] = sum(noise[n] * at[n] ** -1.5 for n in noise)
            values[f"at/{other!r}/step_seconds"] = 0.6 + 2e-4 * sum(at.values())
        values |= {"step_seconds": 0.6 + 2e-4 * sum(c.values()), "exact_step_seconds": 1.0}
        schedule.observe({**values, **alone})
    assert schedule.c_of("a") / schedule.c_of("b") == pytest.approx(100 ** (1 / 2.5), rel=0.05)
    assert schedule.c_of("a") + schedule.c_of("b") == pytest.approx(2 * schedule(0), rel=0.05)
    predicted = Landscape(schedule._probes, schedule(0)).relative_variance(schedule(0))
    assert predicted == pytest.approx(sum(noise[n] * schedule.c_of(n) ** -1.5 for n in noise), rel=0.1)


@pytest.mark.parametrize("missing", ["all", "time", "variance", "nan"])
def test_what_was_not_measured_changes_nothing_wrongly(missing: str) -> None:
    schedule, path = run(USUAL, 3)
    values = USUAL.probe(path[-1], schedule.measure_at())
    if missing == "nan":
        values = dict.fromkeys(values, math.nan)
    else:
        drop = {"all": "", "time": "seconds", "variance": "variance"}[missing]
        values = {name: value for name, value in values.items() if drop not in name}
    schedule.observe(values)
    assert loss(USUAL, schedule, schedule(0)) < 0.05


def test_without_times_c_is_never_infinite() -> None:
    schedule = AutoC()
    for _ in range(5):
        schedule.observe({"sus_variance": 0.5, "batch_variance": 1.0})
    assert math.isfinite(schedule(0))


@pytest.mark.parametrize(
    "change",
    [
        {"c": -1.0},
        {"c": "16"},
        {"finite": math.inf},
        {"count": 1.5},
        {"probes": 3},
        {"probes": [{"passes": 1}]},
        {"probes": [{"passes": [{"c": "x", "variance": 0.1, "seconds": 0.5}], "spread": 1.0}]},
        {"alone": {"a": -1.0}},
        {"shares": [1.0]},
    ],
    ids=str,
)
def test_a_damaged_state_is_named_and_changes_nothing(change: dict[str, Any]) -> None:
    schedule, _ = run(USUAL, 2)
    before = schedule.state_dict()
    with pytest.raises((TypeError, ValueError), match=f"the saved state of AutoC: .*{next(iter(change))}"):
        schedule.load_state_dict({**before, **change})
    assert schedule.state_dict() == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "on": ({"on": "all"}, "on must be one of 'total', 'worst'.*'all'"),
    "per": ({"per": "head"}, "per must be one of"),
    "start": ({"start": 4.0}, "start must be in"),
    "infinite": ({"maximum": math.inf}, "maximum must be finite"),
    "order": ({"minimum": 64.0, "maximum": 32.0, "start": 64.0}, "maximum must be at least"),
    "step": ({"largest_step": 1.0}, "largest_step must be above 1"),
    "type": ({"start": "256"}, "start must be a number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str) -> None:
    arguments, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        AutoC(**arguments)
