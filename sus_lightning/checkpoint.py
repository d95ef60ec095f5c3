"""What a checkpoint holds of the callback, so that a resumed run does what it would have done without interruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from fx_passes.state import check_c, check_counter, shown
from sus_lightning.account import Account
from sus_lightning.auto_c import AutoC
from sus_lightning.pacing import Pacing
from sus_lightning.saved import Saved, check_class_name, check_dict, check_name, check_real
from sus_lightning.schedules import Schedule, check_count, schedule_name
from sus_lightning.steering import per_layer

if TYPE_CHECKING:
    from sus_lightning.callback import SUSBackprop


def saved_state(callback: SUSBackprop) -> dict[str, Any]:
    """c, number of draws, pacing, account, and the schedule's own state."""
    counter, number = callback.backend.state.position
    state: dict[str, Any] = {
        "c": callback.backend.c,
        "site_c": dict(callback._site_c),
        "counter": counter,
        "number": number,
        "probed_step": callback._pacing.probed_step,
        "not_before": callback._pacing.not_before,
        "account": callback._account.state_dict(),
        "variance": dict(callback._variance),
        "by_blocks": callback._by_blocks,
    }
    if isinstance(callback.schedule, Schedule):
        state["schedule"] = callback.schedule.state_dict()
        state["schedule_type"] = type(callback.schedule).__name__
    return state


def load_saved_state(callback: SUSBackprop, state_dict: dict[str, Any]) -> None:
    """Takes over what `saved_state` had returned, of older versions too; nothing where it raises.

    Raises:
        TypeError, ValueError: a value is none that the callback can have had; the message names it.
    """
    saved, state = Saved(state_dict, type(callback).__name__), callback.backend.state
    c = saved.read("c", lambda name, value: check_c(value, name), callback.backend.c)
    site_c = saved.read_dict("site_c", check_count, lambda name, value: check_c(value, name), {})
    counter = saved.read("counter", lambda name, value: check_counter(value, name), 0)
    number = saved.read("number", lambda name, value: None if value is None else check_counter(value, name), None)
    steps = saved.read("probed_step", check_count, 0), saved.read("not_before", check_count, 0)
    by_blocks = saved.read("by_blocks", _check_bool, True)
    variance = saved.read_dict("variance", check_name, check_real, {})
    account = Account()
    if "account" in saved:
        account.load_state_dict(state_dict["account"])
    # Before the type was saved there was no AutoC.
    of = saved.read("schedule_type", check_class_name, "" if isinstance(callback.schedule, AutoC) else None)
    same = of is None or of == type(callback.schedule).__name__  # a run may go on with another schedule
    of_schedule: Mapping[str, Any] = saved.read("schedule", check_dict, {})
    if same and isinstance(callback.schedule, Schedule) and of_schedule:
        callback.schedule.load_state_dict(dict(of_schedule))
    elif of and not same:
        now = schedule_name(callback.schedule)
        rank_zero_info(f"SUSBackprop: the saved state is that of a {of}; {now} starts anew.")
    callback.backend.c = c
    callback._site_c = site_c if same and per_layer(callback.schedule) else {}
    state.resume(counter, number)
    callback._by_blocks = by_blocks
    callback._pacing, callback._variance = Pacing(callback._pacing.budgeted, *steps), variance
    callback._account = account


def _check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but it is {shown(value)}")
    return value
