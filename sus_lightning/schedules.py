"""Schedules of c over the global step, and the check of what a schedule returns."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from fx_passes.state import as_int, check_c, shown


class Schedule(ABC):
    """c as a function of the global step (the number of optimizer steps done so far).

    Any callable ``step -> c`` works as a schedule; a subclass has a readable name, can be written in LightningCLI's
    YAML by its ``class_path``, and can keep state: what ``state_dict`` returns is saved in the checkpoint and given to
    ``load_state_dict``.

    Probes ask all schedules the same: what to measure (`measure`, `measure_at`), and to `observe` it. Most need
    nothing of that.

    Attributes:
        on: the relative variance that counts: "total", over all parameters; or "worst", the largest among the q, k, v
            and o projections of all layers.
        per: "model" is one c for all attention; "layer" gives each attention module its own, `c_of`.

    Examples:
        >>> class InverseSquareRoot(Schedule):
        ...     def __call__(self, step: int) -> float:
        ...         return max(30.0, 1000.0 / (1 + step) ** 0.5)
        >>> InverseSquareRoot()(99)
        100.0
    """

    on = "total"
    per = "model"

    @abstractmethod
    def __call__(self, step: int) -> float:
        """c for the optimizer step number ``step`` (from 0): above 0, infinity allowed."""

    def observe(self, variance: Mapping[str, float]) -> None:  # noqa: B027 (nothing to do for most schedules)
        """Called after each variance probe, with the values that it logs (their names without ``sus/``)."""

    def c_of(self, module: str, c: float | None = None) -> float:
        """c of an attention module, with `per` = "layer", where `c`, by default the one in use, is the mean."""
        raise NotImplementedError(f"{type(self).__name__} has no c of single modules")

    def measure(self, modules: Sequence[str]) -> list[str]:
        """Of these attention modules, those whose variance the next probe is to measure alone."""
        return []

    def measure_at(self) -> list[float]:
        """The c, besides the one in use, at which the next probe is to measure: all finite."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps of this schedule."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes over what `state_dict` had returned."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({arguments})"


class ConstantSchedule(Schedule):
    """The same c at each step.

    Args:
        c: above 0; ``float("inf")`` is the exact backward.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> ConstantSchedule(30)(1000)
        30.0
    """

    def __init__(self, c: float) -> None:
        self.c = check_number("c", c)

    def __call__(self, step: int) -> float:
        return self.c


class _Interpolation(Schedule):
    def __init__(self, start: float, end: float, steps: int) -> None:
        self.start = check_number("start", start, finite=True)
        self.end = check_number("end", end, finite=True)
        self.steps = check_count("steps", steps, at_least=1)

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return self._at(max(step, 0) / self.steps)

    @abstractmethod
    def _at(self, fraction: float) -> float: ...


class LinearSchedule(_Interpolation):
    """A straight line from ``start`` to ``end``, then ``end``.

    Args:
        start: c at step 0, finite and above 0.
        end: c from step ``steps`` on, finite and above 0.
        steps: optimizer steps between the two, at least 1.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> [LinearSchedule(100, 20, steps=4)(step) for step in range(6)]
        [100.0, 80.0, 60.0, 40.0, 20.0, 20.0]
    """

    def _at(self, fraction: float) -> float:
        return self.start + (self.end - self.start) * fraction


class CosineSchedule(LinearSchedule):
    """Half a cosine from ``start`` to ``end``: flat at both ends, then ``end``.

    Args:
        start: c at step 0, finite and above 0.
        end: c from step ``steps`` on, finite and above 0.
        steps: optimizer steps between the two, at least 1.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> [round(CosineSchedule(100, 20, steps=4)(step), 2) for step in range(5)]
        [100.0, 88.28, 60.0, 31.72, 20.0]
    """

    def _at(self, fraction: float) -> float:
        return super()._at((1 - math.cos(math.pi * fraction)) / 2)


class ExponentialSchedule(_Interpolation):
    """From ``start`` to ``end`` by the same factor at each step, then ``end``.

    Args:
        start: c at step 0, finite and above 0.
        end: c from step ``steps`` on, finite and above 0.
        steps: optimizer steps between the two, at least 1.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> [round(ExponentialSchedule(160, 10, steps=4)(step), 6) for step in range(5)]
        [160.0, 80.0, 40.0, 20.0, 10.0]
    """

    def _at(self, fraction: float) -> float:
        return float(self.start * (self.end / self.start) ** fraction)


class StepSchedule(Schedule):
    """A constant c from each of the given steps on.

    Args:
        milestones: step -> c. Steps are from 0, and 0 is among them; c is above 0, infinity allowed.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> schedule = StepSchedule({0: float("inf"), 100: 256, 1000: 30})
        >>> schedule(99), schedule(100), schedule(5000)
        (inf, 256.0, 30.0)
    """

    def __init__(self, milestones: dict[int, float]) -> None:
        if not isinstance(milestones, Mapping) or not milestones:
            raise TypeError(f"milestones must be a dict of step: c with at least one entry, but it is {milestones!r}")
        checked = {
            check_count("a step in milestones", step): check_number(f"milestones[{step}]", c)
            for step, c in milestones.items()
        }
        if 0 not in checked:
            raise ValueError(f"milestones must say what c is at step 0, but its steps are {sorted(checked)}")
        self.milestones = dict(sorted(checked.items()))

    def __call__(self, step: int) -> float:
        return self.milestones[max(s for s in self.milestones if s <= max(step, 0))]


def as_schedule(c: Any) -> Callable[[int], float]:
    """c as a schedule: a number is a constant one, and a dict of steps a `StepSchedule`.

    Raises:
        TypeError, ValueError: c is none of these; the message says what it is and what is allowed.
    """
    if isinstance(c, Mapping):
        return StepSchedule(dict(c))
    if callable(c) and not isinstance(c, (type, Tensor)):
        return c  # type: ignore[no-any-return]
    if _is_number(c):
        return ConstantSchedule(c)
    raise TypeError(
        f"c must be 'auto', a number above 0 (float('inf') is the exact backward), a schedule, a dict of step: c, or a "
        f"function of the global step, but it is {shown(c)}"
    )


def value_at(schedule: Callable[[int], float], step: int) -> float:
    """c at a step, checked.

    Raises:
        TypeError, ValueError: the schedule returned something that is not a number above 0; the message names it.
    """
    value: Any = schedule(step)
    name = f"the c that the schedule {schedule_name(schedule)} returned for step {step}"
    return check_number(name, value.item() if isinstance(value, Tensor) and value.dim() == 0 else value)


def observes(schedule: Callable[[int], float]) -> bool:
    """Whether it takes anything from probes."""
    return isinstance(schedule, Schedule) and type(schedule).observe is not Schedule.observe


def schedule_name(schedule: Callable[[int], float]) -> str:
    if isinstance(schedule, Schedule):
        return repr(schedule)
    return getattr(schedule, "__qualname__", None) or repr(schedule)


def check_number(name: str, value: Any, *, finite: bool = False) -> float:
    """A number above 0 as float; TypeError or ValueError that names the argument otherwise."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number above 0, but it is {shown(value)}")
    number = check_c(value, name)
    if finite and math.isinf(number):
        raise ValueError(f"{name} must be finite and above 0, but it is {value}")
    return number


def check_range(start: Any, minimum: Any, maximum: Any) -> tuple[float, float, float]:
    """The c to begin with and its bounds as floats; TypeError or ValueError that names the argument otherwise."""
    first = check_number("start", start, finite=True)
    least = check_number("minimum", minimum, finite=True)
    most = check_number("maximum", maximum, finite=True)
    if most < least:
        raise ValueError(f"maximum must be at least minimum = {minimum}, but it is {maximum}")
    if not least <= first <= most:
        raise ValueError(f"start must be in [minimum, maximum] = [{minimum}, {maximum}], but it is {start}")
    return first, least, most


def check_amount(name: str, value: Any) -> float:
    """A finite number of at least 0 as float; TypeError or ValueError that names the argument otherwise."""
    if not _is_number(value):
        raise TypeError(f"{name} must be a number of at least 0, but it is {shown(value)}")
    number = as_float(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, but it is {shown(value)}")
    return number


def as_float(name: str, value: Any) -> float:
    """A number as float; ValueError that names the argument where it is too large."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, but it is {shown(value)}") from None


def check_count(name: str, value: Any, *, at_least: int = 0) -> int:
    """An int of at least `at_least`, below 2^63; TypeError or ValueError that names the argument otherwise."""
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int of at least {at_least}, but it is {shown(value)}")
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}, but it is {shown(value)}")
    if number >= 1 << 63:
        raise ValueError(f"{name} must be below 2^63, but it is {shown(value)}")
    return number


def _is_number(value: Any) -> bool:
    # Real covers numpy's scalars; bool is an int in Python, but nobody means c = True.
    return isinstance(value, Real) and not isinstance(value, bool)
