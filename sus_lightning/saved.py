"""Reads what a checkpoint saved: each value is checked, and what an older version did not save has its default."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, TypeVar

from fx_passes.state import shown

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
        except OverflowError:
            raise ValueError(f"the saved state of {self._owner}: {name} must fit into a float") from None


def check_name(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, but it is {shown(value)}")
    return value


def check_real(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but it is {shown(value)}")
    return float(value)


def check_dict(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict, but it is {shown(value)}")
    return value


def check_class_name(name: str, value: Any) -> str:
    if not check_name(name, value).isidentifier():
        raise ValueError(f"{name} must be the name of a class, but it is {shown(value)}")
    return str(value)
