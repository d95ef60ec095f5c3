"""Reads what a checkpoint saved: each value is checked, and what an older version did not save has its default.

What each object saves stands in a table of checks by name, beside the code that saves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from numbers import Real
from typing import Any, TypeVar

from fx_passes.state import shown
from sus_lightning.schedules import as_float

T = TypeVar("T")


class Saved:
    """The saved state of one object.

    Args:
        state: what its `state_dict` had returned.
        owner: whose it is, for messages.

    Raises:
        TypeError: `state` is no mapping.
    """

    def __init__(self, state: Any, owner: str) -> None:
        if not isinstance(state, Mapping):
            raise TypeError(f"the saved state of {owner} must be a dict, but it is {shown(state)}")
        self._state, self._owner = state, owner

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def read(self, name: str, check: Callable[[str, Any], T], default: T) -> T:
        """The value with this name, through `check(name, value)`; `default` where nothing was saved.

        Raises:
            TypeError, ValueError: those of `check`, with the owner.
        """
        return self._checked(check, name, self._state[name]) if name in self._state else default

    def read_all(self, checks: Mapping[str, tuple[Check, Any]]) -> dict[str, Any]:
        """The values of a table of checks and defaults."""
        return {name: self.read(name, check, copy(default)) for name, (check, default) in checks.items()}

    def read_dict(
        self, name: str, check_key: Callable[[str, Any], Any], check: Callable[[str, Any], T], default: dict[Any, T]
    ) -> dict[Any, T]:
        """As `read`, for a dict whose keys and values are checked."""
        if name not in self._state:
            return dict(default)
        value = self._state[name]
        if not isinstance(value, Mapping):
            raise TypeError(f"the saved state of {self._owner}: {name} must be a dict, but it is {shown(value)}")
        return {
            self._checked(check_key, f"a key of {name}", key): self._checked(check, f"{name}[{key!r}]", item)
            for key, item in value.items()
        }

    def _checked(self, check: Callable[[str, Any], T], name: str, value: Any) -> T:
        try:
            return check(name, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"the saved state of {self._owner}: {error}") from None


Check = Callable[[str, Any], Any]


def check_name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, but it is {shown(value)}")
    return value


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, but it is {shown(value)}")
    return value


def check_real(name: str, value: Any) -> float:
    """Any number, also infinity and NaN, as the loss of a run that diverged."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but it is {shown(value)}")
    return as_float(name, value)


def check_finite(name: str, value: Any) -> float:
    number = check_real(name, value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, but it is {shown(value)}")
    return number


def check_dict(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, but it is {shown(value)}")
    return value


def check_class_name(name: str, value: Any) -> str:
    if not check_name(name, value).isidentifier():
        raise ValueError(f"{name} must be the name of a class, but it is {shown(value)}")
    return str(value)


def optional(check: Check, default: Any = math.nan) -> Check:
    """A check that takes None too, for `default`: what was not measured is NaN, and saved as None."""
    return lambda name, value: default if value is None else check(name, value)


def check_record(checks: Mapping[str, Check], required: Collection[str], name: str, value: Any) -> dict[str, Any]:
    """A dict with the values of a table, each by its own check, and no others."""
    given = check_dict(name, value)
    missing = [key for key in required if key not in given]
    if missing:
        raise ValueError(f"{name} must have {', '.join(missing)}")
    unknown = [key for key in given if key not in checks]
    if unknown:
        raise ValueError(f"{name} must not have {', '.join(map(shown, unknown))}")
    return {key: checks[key](f"{name}[{key!r}]", item) for key, item in given.items()}


def check_list(check: Callable[[str, Any], T], name: str, value: Any) -> list[T]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a list, but it is {shown(value)}")
    return [check(f"{name}[{i}]", item) for i, item in enumerate(value)]


def without_nan(value: Any) -> Any:
    """A state with None for each NaN, in dicts and lists too."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value
