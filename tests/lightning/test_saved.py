"""State from a checkpoint: bad values are named when it is loaded, older states load, nothing is half done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from models import Plain, loader, trainer

from fx_passes.state import State
from sus_lightning import SUSBackprop, VarianceTarget

NAN, INF = float("nan"), float("inf")

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
