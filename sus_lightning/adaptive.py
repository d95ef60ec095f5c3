"""What schedules have in common that adapt c, of all attention or of each module, to what probes measure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from fx_passes.ops.arguments import check_choice
from sus_lightning.layer_shares import LayerShares
from sus_lightning.saved import Saved
from sus_lightning.schedules import Schedule, check_count, check_number, check_range

ON = ("total", "worst")
PER = ("model", "layer")
ALONE = "sus_variance_alone/"  # prefix of the values of `measure`
AT = "at/"  # prefix of the values of `measure_at`: "at/64.0/sus_variance"


class Adaptive(Schedule):
    """A c between bounds that moves by bounded steps, and the shares that attention modules have of it.

    Args:
        on: "total" or "worst", see `Schedule`.
        per: "model" or "layer", see `Schedule`.
        start: c until the first probe.
        minimum: lower bound of c.
        maximum: upper bound of c, at least `minimum`; finite.
        largest_step: c changes by at most this factor per probe, above 1.
        smoothing: of `LayerShares`.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
    """

    def __init__(
        self, on: str, per: str, start: float, minimum: float, maximum: float, largest_step: float, smoothing: float
    ) -> None:
        check_choice("on", on, ON)
        check_choice("per", per, PER)
        self.on, self.per = on, per
        self.start, self.minimum, self.maximum = check_range(start, minimum, maximum)
        self.largest_step = check_number("largest_step", largest_step, finite=True)
        if self.largest_step <= 1:
            raise ValueError(f"largest_step must be above 1, but it is {largest_step}")
        self._c, self._count = self.start, 0  # probes
        self._shares = LayerShares(smoothing)

    def __call__(self, step: int) -> float:
        return self._c

    def c_of(self, module: str, c: float | None = None) -> float:
        c = self._c if c is None else c
        return c if math.isinf(c) else self._bounded(c * self._shares.of(module))

    def measure(self, modules: Sequence[str]) -> list[str]:
        """New modules, or else the next in turn."""
        return [] if self.per == "model" or math.isinf(self._c) else self._shares.next(modules, self._count)

    def _noise(self, values: Mapping[str, float], spread: float) -> float:
        """The variance that counts, of values at one c; NaN where it was not measured."""
        if self.on == "worst":
            return values.get("worst_relative_variance", math.nan) * spread
        return values.get("sus_variance", math.nan)

    def _share(self, values: Mapping[str, float], spread: float) -> float:
        """Changes the shares by what modules add alone; returns the factor by which the whole variance changes."""
        alone = {name.removeprefix(ALONE): v for name, v in values.items() if name.startswith(ALONE)}
        if not alone or not spread > 0:
            return 1.0
        return self._shares.observe({name: (v / spread, self.c_of(name)) for name, v in alone.items()})

    def _next(self, c: float, wanted: float) -> float:
        """`wanted` or as far as c may move towards it."""
        return self._bounded(min(c * self.largest_step, max(c / self.largest_step, wanted)))

    def _bounded(self, c: float) -> float:
        return round(self._within(c), 6)

    def _within(self, c: float) -> float:
        return min(self.maximum, max(self.minimum, c))

    def state_dict(self) -> dict[str, Any]:
        return {"c": self._c, "count": self._count, **self._shares.state_dict()}

    def _read(self, saved: Saved, finite: bool) -> dict[str, Any]:
        """The attributes that `state_dict` saved, checked."""
        c = saved.read("c", partial(check_number, finite=finite), self._c)
        return {
            "_c": c if math.isinf(c) else self._within(c),
            "_count": saved.read("count", check_count, 0),
            "_shares": self._shares.read(saved),
        }
