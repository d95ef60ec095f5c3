"""What a checkpoint holds of the callback, so that a resumed run does what it would have done without interruption."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from fx_passes.state import check_c, check_counter
from sus_lightning.account import Account
from sus_lightning.auto_c import AutoC
from sus_lightning.pacing import Pacing
from sus_lightning.saved import (
    Check,
    Saved,
    check_bool,
    check_class_name,
    check_dict,
    check_finite,
    check_name,
    optional,
    without_nan,
)
from sus_lightning.schedules import Schedule, check_amount, check_count, schedule_name
from sus_lightning.steering import per_layer

if TYPE_CHECKING:
    from sus_lightning.callback import SUSBackprop

VERSION = 1  # of the saved state; states without one are older


def saved_state(callback: SUSBackprop) -> dict[str, Any]:
    """c, number of draws, pacing, account, and the schedule's own state."""
    counter, number = callback.backend.state.position
    state: dict[str, Any] = {
        "version": VERSION,
        "c": callback.backend.c,
        "site_c": dict(callback._site_c),
        "counter": counter,
        "number": number,
        "probed_step": callback._pacing.probed_step,
        "not_before": callback._pacing.not_before,
        "account": callback._account.state_dict(),
        "variance": without_nan(callback._variance),
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
    owner, state = type(callback).__name__, callback.backend.state
    saved = Saved(state_dict, owner)
    if "version" not in saved:  # it saved NaN for what was not measured
        state_dict = {name: value if name in _NUMBERS else without_nan(value) for name, value in state_dict.items()}
        saved = Saved(state_dict, owner)
    read = saved.read_all(_CHECKS)
    site_c = saved.read_dict("site_c", check_count, lambda name, value: check_c(value, name), {})
    variance = saved.read_dict("variance", check_name, _check_variance, {})
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
    callback.backend.c = callback.backend.c if read["c"] is None else read["c"]
    callback._site_c = site_c if same and per_layer(callback.schedule) else {}
    state.resume(read["counter"], read["number"])
    callback._by_blocks = read["by_blocks"]
    callback._pacing = Pacing(callback._pacing.budgeted, read["probed_step"], read["not_before"])
    callback._variance, callback._account = variance, account


def _draws(name: str, value: Any) -> int:
    return check_counter(value, name)


_CHECKS: dict[str, tuple[Check, Any]] = {
    "version": (partial(check_count, at_least=1), VERSION),
    "c": (lambda name, value: check_c(value, name), None),
    "counter": (_draws, 0),
    "number": (optional(_draws, None), None),
    "probed_step": (check_count, 0),
    "not_before": (check_count, 0),
    "by_blocks": (check_bool, True),
}
_NUMBERS = {*_CHECKS, "schedule_type"}  # by themselves, and never NaN
_SIGNED = {"squared_gradient", "gradient_noise_scale"}  # estimates; all others of a probe are at least 0


def _check_variance(name: str, value: Any) -> float:
    signed = any(name == f"variance[{key!r}]" for key in _SIGNED)
    number: float = optional(check_finite if signed else check_amount)(name, value)
    return number
