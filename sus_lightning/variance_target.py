"""VarianceTarget: the schedule that finds c by itself, from the measured gradient variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sus_lightning.schedules import Schedule, check_number

ON = ("total", "worst")

# Relative variance falls about as c ** -1.5: measured on a byte LM (c = 8 .. 64) and on SmolLM2-135M (c = 30 .. 150).
# Only the speed of the loop depends on it, not where it settles.
_SLOPE = 1.5


class VarianceTarget(Schedule):
    """Holds the relative gradient-variance increase at a target by adapting c after each probe.

    Nobody knows the right c beforehand: the same increase of 1% takes c = 30 on a small byte LM and c = 150 on
    SmolLM2-135M, and it drifts while attention sharpens. After a probe that measured the increase r, ::

        log c  +=  smoothing / 1.5 * (log r - log target)

    which is integral control in log space: it settles where r equals the target, for any power law r ~ c ** -p with
    p below 3 / smoothing. The first probe closes the whole gap (warm start), later ones the share ``smoothing`` of it.

    Note:
        The probes of :class:`~sus_lightning.SUSBackprop` are what this schedule sees, so ``variance_every_n_steps``
        is the speed of the loop. All ranks see the same reduced value, so c stays equal on all of them. c and the
        number of probes are saved in the checkpoint.

    Example::

        Trainer(callbacks=[SUSBackprop(c=VarianceTarget(0.01), variance_every_n_steps=200)])

    Args:
        target: the relative variance to hold, such as 0.01 for 1%; finite and above 0.
        on: "total" holds the sum over all parameters; "worst" holds the largest among the q, k, v and o projections
            of all layers. The total hides that query projections take 5 to 7 times more noise, and Adam normalises
            each parameter by itself.
        start: c until the first probe.
        minimum: lower bound of c.
        maximum: upper bound of c, at least `minimum`; finite.
        smoothing: share of the gap that a probe closes, in (0, 1].
        largest_step: c changes by at most this factor per probe, above 1.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    >>> schedule = VarianceTarget(0.01, start=30)
    >>> schedule.observe({"relative_variance": 0.08})  # as SmolLM2-135M has at c = 30
    >>> schedule(1)
    120.0
    """

    def __init__(
        self,
        target: float = 0.01,
        on: str = "total",
        start: float = 64.0,
        minimum: float = 4.0,
        maximum: float = 4096.0,
        smoothing: float = 0.5,
        largest_step: float = 8.0,
    ) -> None:
        self.target = check_number("target", target, finite=True)
        if on not in ON:
            raise ValueError(f"on must be one of {', '.join(map(repr, ON))}, but it is {on!r}")
        self.on = on
        self.start = check_number("start", start, finite=True)
        self.minimum = check_number("minimum", minimum, finite=True)
        self.maximum = check_number("maximum", maximum, finite=True)
        if self.maximum < self.minimum:
            raise ValueError(f"maximum must be at least minimum = {minimum}, but it is {maximum}")
        if not self.minimum <= self.start <= self.maximum:
            raise ValueError(f"start must be in [minimum, maximum] = [{minimum}, {maximum}], but it is {start}")
        self.smoothing = check_number("smoothing", smoothing)
        if self.smoothing > 1:
            raise ValueError(f"smoothing must be in (0, 1], but it is {smoothing}")
        self.largest_step = check_number("largest_step", largest_step, finite=True)
        if self.largest_step <= 1:
            raise ValueError(f"largest_step must be above 1, but it is {largest_step}")
        self._c = self.start
        self._probes = 0

    def __call__(self, step: int) -> float:
        return self._c

    def observe(self, variance: Mapping[str, float]) -> None:
        measured = variance.get("relative_variance" if self.on == "total" else "worst_relative_variance", math.nan)
        if math.isnan(measured) or math.isinf(measured):
            return  # no batch variance to compare with: keep c
        share = self.smoothing if self._probes else 1.0
        limit = math.log(self.largest_step)
        # A measured 0 (all entries kept) has no logarithm: it asks for the largest step down.
        gap = (math.log(measured) - math.log(self.target)) / _SLOPE if measured > 0 else -math.inf
        change = max(-limit, min(limit, share * gap))
        self._c = round(min(self.maximum, max(self.minimum, self._c * math.exp(change))), 6)
        self._probes += 1

    def state_dict(self) -> dict[str, Any]:
        return {"c": self._c, "probes": self._probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._c, self._probes = float(state["c"]), int(state["probes"])
