"""State from a checkpoint: bad values are named when it is loaded, older states load, nothing is half done."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from models import Plain, loader, trainer

from fx_passes.state import State
from sus_lightning import AutoC, SUSBackprop, VarianceTarget

NAN, INF = float("nan"), float("inf")

BAD = (NAN, INF, -INF, -1.0)
AMOUNTS = ("entries", "rows", "dense", "seconds", "probe_seconds", "compile_seconds")
POSITIVE = ("step", "c", "relative_variance", "worst_relative_variance", "batch_variance", "step_speedup",
            "net_speedup")  # fmt: skip
PROBE = dict.fromkeys((*POSITIVE, "squared_gradient"), 1.0)
CALLBACK: list[tuple[str, Any, type[Exception], str]] = [
    ("c", "30", TypeError, "c must be a number above 0"),
    ("c", 0, ValueError, "c must be above 0"),
    ("c", NAN, ValueError, "c must be above 0"),
    ("c", None, TypeError, "c must be a number"),
    ("site_c", [3], TypeError, "site_c must be a dict"),
    ("site_c", {"a": 3.0}, TypeError, "a key of site_c must be an int"),
    ("site_c", {-1: 3.0}, ValueError, "a key of site_c must be at least 0"),
    ("site_c", {0: "x"}, TypeError, r"site_c\[0\] must be a number"),
    ("counter", "x", TypeError, "counter must be an int of at least 0, but it is 'x'"),
    ("counter", 1.5, TypeError, "counter must be an int of at least 0, but it is 1.5"),
    ("counter", None, TypeError, "counter must be an int of at least 0, but it is None"),
    ("counter", -1, ValueError, "counter must be in"),
    ("counter", 10**30, ValueError, "counter must be in"),
    ("number", "x", TypeError, "number must be an int"),
    ("number", -3, ValueError, "number must be in"),
    ("probed_step", NAN, TypeError, "probed_step must be an int"),
    ("probed_step", 1e9, TypeError, "probed_step must be an int"),
    ("probed_step", -1, ValueError, "probed_step must be at least 0"),
    ("probed_step", "3", TypeError, "probed_step must be an int"),
    ("variance", None, TypeError, "variance must be a dict"),
    ("variance", {"a": "b"}, TypeError, r"variance\['a'\] must be a number"),
    ("variance", {"a": 10**400}, ValueError, r"variance\['a'\] must fit into a float"),
    ("variance", {1: 1.0}, TypeError, "a key of variance must be a string"),
    *(("variance", {"relative_variance": x}, ValueError, r"variance\['relative_variance'\] must be") for x in BAD),
    ("variance", {"squared_gradient": NAN}, ValueError, r"variance\['squared_gradient'\] must be finite"),
    ("probed_step", 10**400, ValueError, r"probed_step must be below 2\^63"),
    ("not_before", 10**400, ValueError, r"not_before must be below 2\^63"),
    ("site_c", {10**400: 3.0}, ValueError, r"a key of site_c must be below 2\^63"),
    ("by_blocks", 1, TypeError, "by_blocks must be True or False"),
    ("account", 3, TypeError, "the account must be a dict"),
    *(("account", {name: x}, ValueError, f"the account: {name} must be") for x in BAD for name in AMOUNTS),
    ("account", {"c": [(1, NAN)]}, ValueError, "the account: c at step 1 must be above 0"),
    ("account", {"c": [(10**400, 3.0)]}, ValueError, "the account: a step of c must be below"),
    ("account", {"losses": [(1, "x")]}, TypeError, "the account: losses at step 1 must be a number"),
    ("account", {"probes": [{}]}, ValueError, r"the account: probes\[0\] must have step, c"),
    *(("account", {"probes": [{**PROBE, k: -1.0}]}, ValueError, rf"probes\[0\]\['{k}'\] must be") for k in POSITIVE),
    *(("account", {"probes": [{**PROBE, k: NAN}]}, ValueError, rf"probes\[0\]\['{k}'\] must be") for k in PROBE),
    *(("schedule", x, TypeError, "schedule must be a dict") for x in (3, "x", -1, NAN, 1.5, None, [])),
    *(("schedule_type", x, TypeError, "schedule_type must be a string") for x in (3, None, NAN, [])),
    *(("schedule_type", x, ValueError, "schedule_type must be the name of a class") for x in ("", "a b", "-1")),
]

SCHEDULE: list[tuple[str, Any, type[Exception], str]] = [
    ("c", "30", TypeError, "c must be a number above 0"),
    ("c", INF, ValueError, "c must be finite"),
    ("c", -2.0, ValueError, "c must be above 0"),
    ("noise", -1.0, ValueError, "noise must be finite and at least 0"),
    ("noise", NAN, ValueError, "noise must be finite"),
    ("noise", "x", TypeError, "noise must be a number"),
    ("spread", -1.0, ValueError, "spread must be finite and at least 0"),
    ("spread", INF, ValueError, "spread must be finite"),
    ("spread", 0.0, ValueError, "spread must be above 0 after probes"),
    ("probes", 1.5, TypeError, "probes must be an int"),
    ("probes", -1, ValueError, "probes must be at least 0"),
    ("probes", 10**400, ValueError, r"probes must be below 2\^63"),
    ("alone", {"a": -1.0}, ValueError, r"alone\['a'\] must be finite and at least 0"),
    ("alone", [1.0], TypeError, "alone must be a dict"),
    ("shares", {"a": 0.0}, ValueError, r"shares\['a'\] must be above 0"),
    ("shares", {"a": NAN}, ValueError, r"shares\['a'\] must be above 0"),
]


def target() -> VarianceTarget:
    schedule = VarianceTarget(0.05, start=6)
    schedule.observe({"sus_variance": 0.1, "batch_variance": 1.0})
    return schedule


def callback() -> SUSBackprop:
    torch.manual_seed(0)
    made = SUSBackprop(c=target(), compiler="eager")
    made.backend.state.next_seed()
    return made


@pytest.mark.parametrize(("name", "value", "error", "message"), CALLBACK)
def test_a_bad_value_of_the_callback(name: str, value: Any, error: type[Exception], message: str) -> None:
    made = callback()
    before = made.state_dict()
    with pytest.raises(error, match=message) as raised:
        made.load_state_dict({**before, "c": 5.0, "counter": 7, name: value})
    assert "the saved state of" in str(raised.value)
    assert made.state_dict() == before


@pytest.mark.parametrize(("name", "value", "error", "message"), SCHEDULE)
def test_a_bad_value_of_the_schedule(name: str, value: Any, error: type[Exception], message: str) -> None:
    made = callback()
    before = made.state_dict()
    bad = {**before["schedule"], "c": 11.0, name: value}
    with pytest.raises(error, match=f"the saved state of VarianceTarget: {message}"):
        made.schedule.load_state_dict(bad)
    with pytest.raises(error, match=f"the saved state of VarianceTarget: {message}"):
        made.load_state_dict({**before, "counter": 9, "schedule": bad})
    assert made.state_dict() == before


@pytest.mark.parametrize("c", ["auto", 3.0, lambda step: 5.0])
def test_a_bad_schedule_whatever_the_own_one(c: Any) -> None:
    """A run may go on with another schedule; what is no state of any is an error all the same."""
    made = SUSBackprop(c=c, compiler="eager")
    before = made.state_dict()
    bad = [("schedule", x) for x in (None, "x", -1, NAN, 1.5)] + [("schedule_type", x) for x in ("", "a b", 3, None)]
    for name, value in bad:
        with pytest.raises((TypeError, ValueError), match=f"the saved state of SUSBackprop: {name} must be"):
            made.load_state_dict({**before, "counter": 9, name: value})
        assert made.state_dict() == before


AUTO: list[tuple[str, Any, str]] = [
    *((name, x, f"{name} must be") for name in ("count", "switches") for x in (-1, 10**400, NAN, "x", True)),
    *(("finite", x, "finite must (be|fit)") for x in (NAN, INF, 0.0, -1.0, "x", 10**400)),
    ("probes", "x", "probes must be a list"),
    *((f"probes.{name}", x, rf"probes\[0\]\['{name}'\] must be") for name, x in (
        ("spread", NAN), ("spread", -1.0), ("squared_gradient", INF), ("exact_samples", 0), ("exact_samples", 10**400),
        ("passes", 3))),
    *((f"passes.{name}", x, rf"probes\[0\]\['passes'\]\[0\]\['{name}'\] must (be|fit)") for name, x in (
        ("c", INF), ("c", NAN), ("variance", -1.0), ("variance", NAN), ("seconds", 0.0), ("seconds", 10**400),
        ("samples", 0), ("kept", -1.0), ("full", 1))),
    ("passes.x", 3, "must not have 'x'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), AUTO)
def test_a_bad_value_of_auto(name: str, value: Any, message: str) -> None:
    made = SUSBackprop(c="auto", compiler="eager")
    made.schedule.observe({"sus_variance": 0.01, "batch_variance": 1.0, "step_seconds": 0.6, "exact_step_seconds": 1.0})
    before = made.state_dict()
    state = deepcopy(before)
    of, _, inner = name.rpartition(".")
    schedule = state["schedule"]
    {"": schedule, "probes": schedule["probes"][0], "passes": schedule["probes"][0]["passes"][0]}[of][inner] = value
    with pytest.raises((TypeError, ValueError), match=f"the saved state of AutoC: .*{message}"):
        made.load_state_dict(state)
    assert made.state_dict() == before


def test_what_was_not_measured_is_saved_and_loaded() -> None:
    made = SUSBackprop(c="auto", compiler="eager")
    made.schedule.observe({"sus_variance": 0.01, "batch_variance": 1.0})
    made._account.note_probe(3, 64.0, {"relative_variance": 0.1})
    made._account.note_loss(3, torch.tensor(NAN))
    made._account.compile_seconds = NAN
    made._variance = {"relative_variance": 0.1, "worst_relative_variance": NAN}
    state = made.state_dict()
    for saved in (state, json.loads(json.dumps(state)), _with_nan({k: v for k, v in state.items() if k != "version"})):
        again = SUSBackprop(c="auto", compiler="eager")
        again.load_state_dict(saved)
        found = {**again.state_dict(), "number": state["number"]}
        assert json.dumps(found, sort_keys=True) == json.dumps(state, sort_keys=True)
        assert math.isnan(again._variance["worst_relative_variance"])
        assert math.isnan(again._account.probes[0]["step_speedup"])


def _with_nan(state: Any) -> Any:
    """As states without a version have it."""
    if isinstance(state, dict):
        return {k: v if k == "number" else _with_nan(v) for k, v in state.items()}
    return [_with_nan(v) for v in state] if isinstance(state, list) else NAN if state is None else state


def test_another_schedule_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = SUSBackprop(c="auto", compiler="eager")
    with caplog.at_level("INFO"):
        made.load_state_dict(callback().state_dict())
    assert "the saved state is that of a VarianceTarget" in caplog.text


def test_states_of_older_versions_load() -> None:
    saved = callback().state_dict()
    for missing in [*saved, None]:
        made = callback()
        made.load_state_dict({} if missing is None else {k: v for k, v in saved.items() if k != missing})
        made.backend.state.next_seed()
    for missing in [*saved["schedule"], None]:
        schedule = target()
        schedule.load_state_dict(
            {} if missing is None else {k: v for k, v in saved["schedule"].items() if k != missing}
        )
        schedule.observe({"sus_variance": 0.1, "batch_variance": 1.0})
        assert 0 < schedule(1) < INF
    with pytest.raises(TypeError, match="the saved state of SUSBackprop must be a dict, but it is None"):
        callback().load_state_dict(None)  # type: ignore[arg-type]


def test_a_probe_from_the_future_is_named() -> None:
    made = SUSBackprop(c=3, compiler="eager")
    fit = trainer(callbacks=[made], max_steps=1)
    state = {**made.state_dict(), "probed_step": 10**9}
    setup = made.setup

    def restored(*args: Any, **kwargs: Any) -> None:
        setup(*args, **kwargs)
        made.load_state_dict(state)

    made.setup = restored  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"probed_step must be at most the global step 0 .* but it is 1000000000"):
        fit.fit(Plain(), loader())


def test_a_resumed_callback_draws_the_same_whatever_draws_beside_it() -> None:
    seed_everything(3, verbose=False)
    State(1.0).next_seed()
    first = SUSBackprop(c=3, compiler="eager")
    first.backend.state.next_seed()
    saved, rest = first.state_dict(), [first.backend.state.next_seed() for _ in range(3)]
    seed_everything(3, verbose=False)
    others = [State(1.0) for _ in range(4)]
    drawn = {other.next_seed() for other in others}
    again = SUSBackprop(c=3, compiler="eager")
    again.load_state_dict(saved)
    assert [again.backend.state.next_seed() for _ in range(3)] == rest
    assert not {other.next_seed() for other in others} & {*drawn, *rest}


def test_a_saved_c_is_taken_within_the_bounds() -> None:
    """One outside of them, of a checkpoint with other bounds or a damaged one, could not be steered from."""
    for schedule in (AutoC(start=16, minimum=4, maximum=64), VarianceTarget(0.01, start=8, minimum=4, maximum=64)):
        for c, within in ((5e-324, 4.0), (1e300, 64.0), (7.5, 7.5)):
            state = {**schedule.state_dict(), "c": c}
            if "finite" in state:
                state["finite"] = c
            schedule.load_state_dict(state)
            assert schedule(0) == within
            assert schedule.state_dict().get("finite", within) == within
