"""VarianceTarget: the schedule that finds c by itself, from the measured gradient variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sus_lightning.saved import Saved, check_name
from sus_lightning.schedules import Schedule, check_amount, check_count, check_number, check_range

ON = ("total", "worst")
PER = ("model", "layer")
ALONE = "sus_variance_alone/"  # prefix of the values of `measure`

# Relative variance falls about as c ** -1.5: measured on a byte LM (c = 8 .. 64) and on SmolLM2-135M (c = 30 .. 150).
# Only the speed of the loop depends on it, not where it settles.
_SLOPE = 1.5


class VarianceTarget(Schedule):
    """Holds the relative gradient-variance increase at a target by adapting c after each probe.

    Nobody knows the right c beforehand: the same increase of 1% takes c = 30 on a small byte LM and c = 150 on
    SmolLM2-135M, and it drifts while attention sharpens. Noise falls about as c ** -p with p = 1.5, so a probe at c
    that measured the variances ``sus`` and ``batch`` says how much noise there would be at c = 1. Both are averaged
    over probes, of which the last one has the weight ``smoothing``, and the next c is where their ratio is the target:

        noise  =  (1 - smoothing) * noise   +  smoothing * sus * c ** p
        spread =  (1 - smoothing) * spread  +  smoothing * batch
        c      =  (noise / spread / target) ** (1 / p)

    It settles where the ratio of the averaged variances equals the target, whatever the true exponent is (below
    2 p / smoothing). The first probe has the weight 1 (warm start).

    With ``per="layer"`` this is the mean c, and each attention module has a share of it. The variance is the sum of
    what each module's draws add alone, ``a_l * c_l ** -p``, so that the smallest sum of c at a given variance has
    ``c_l ~ a_l ** (1 / (p + 1))``. The first probe measures each module alone (one more forward and backward for each),
    later probes one after the other. Worth it where the modules differ: see docs/metrics.md.

    Note:
        The probes of `SUSBackprop` are what this schedule sees, so ``variance_every_n_steps``
        is the speed of the loop. All ranks see the same reduced value, so c stays equal on all of them. c and the
        number of probes are saved in the checkpoint.

    Args:
        target: the relative variance to hold, such as 0.01 for 1%; finite and above 0.
        on: "total" holds the sum over all parameters; "worst" holds the largest among the q, k, v and o projections
            of all layers. The total hides that query projections take 5 to 7 times more noise, and Adam normalises
            each parameter by itself.
        per: "model" is one c for all; "layer" is one for each attention module, known by its name in the report.
        start: c until the first probe.
        minimum: lower bound of c.
        maximum: upper bound of c, at least `minimum`; finite.
        smoothing: weight of the last probe in the averages, in (0, 1].
        largest_step: c changes by at most this factor per probe, above 1.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        ``SUSBackprop(c=VarianceTarget(0.01), variance_every_n_steps=200)`` uses it; by hand:

        >>> schedule = VarianceTarget(0.01, start=30)
        >>> schedule.observe({"sus_variance": 0.08, "batch_variance": 1.0})  # as SmolLM2-135M has at c = 30
        >>> schedule(1)
        120.0
    """

    def __init__(
        self,
        target: float = 0.01,
        on: str = "total",
        per: str = "model",
        start: float = 64.0,
        minimum: float = 4.0,
        maximum: float = 4096.0,
        smoothing: float = 0.5,
        largest_step: float = 8.0,
    ) -> None:
        self.target = check_number("target", target, finite=True)
        for name, value, allowed in (("on", on, ON), ("per", per, PER)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but it is {value!r}")
        self.on, self.per = on, per
        self.start, self.minimum, self.maximum = check_range(start, minimum, maximum)
        self.smoothing = check_number("smoothing", smoothing)
        if self.smoothing > 1:
            raise ValueError(f"smoothing must be in (0, 1], but it is {smoothing}")
        self.largest_step = check_number("largest_step", largest_step, finite=True)
        if self.largest_step <= 1:
            raise ValueError(f"largest_step must be above 1, but it is {largest_step}")
        self._c = self.start
        self._noise = self._spread = 0.0
        self._probes = 0
        self._alone: dict[str, float] = {}  # a_l over the batch variance, by attention module
        self._shares: dict[str, float] = {}  # c_l over c

    def __call__(self, step: int) -> float:
        return self._c

    def c_of(self, module: str) -> float:
        """c of an attention module."""
        return round(min(self.maximum, max(self.minimum, self._c * self._shares.get(module, 1.0))), 6)

    def measure(self, modules: Sequence[str]) -> list[str]:
        """The attention modules that the next probe is to measure alone: new ones, or else the next in turn."""
        if self.per == "model" or not modules:
            return []
        new = [module for module in modules if module not in self._alone]
        return new or [modules[self._probes % len(modules)]]

    def observe(self, variance: Mapping[str, float]) -> None:
        noise, spread = self._measured(variance)
        if not (math.isfinite(noise) and math.isfinite(spread) and spread > 0):
            return  # no batch variance to compare with: keep c
        weight = self.smoothing if self._probes else 1.0
        self._noise += weight * (noise * self._c**_SLOPE - self._noise)
        self._spread += weight * (spread - self._spread)
        self._share({name.removeprefix(ALONE): v for name, v in variance.items() if name.startswith(ALONE)})
        wanted = (self._noise / self._spread / self.target) ** (1 / _SLOPE)
        low = max(self.minimum, self._c / self.largest_step)
        self._c = round(min(self.maximum, self._c * self.largest_step, max(low, wanted)), 6)
        self._probes += 1

    def _measured(self, variance: Mapping[str, float]) -> tuple[float, float]:
        spread = variance.get("batch_variance", math.nan)
        if self.on == "worst":
            return variance.get("worst_relative_variance", math.nan) * spread, spread
        return variance.get("sus_variance", math.nan), spread

    def _share(self, measured: Mapping[str, float]) -> None:
        """Shares of c from what modules add alone, and the noise that is to be expected with them."""
        for module, noise in measured.items():
            if math.isfinite(noise):
                alone, known = noise / self._spread * self.c_of(module) ** _SLOPE, self._alone.get(module)
                self._alone[module] = alone if known is None else known + self.smoothing * (alone - known)
        if not any(self._alone.values()):
            return
        least = max(self._alone.values()) * 1e-6  # a module that adds nothing still needs a c
        roots = {module: max(alone, least) ** (1 / (_SLOPE + 1)) for module, alone in self._alone.items()}
        mean = sum(roots.values()) / len(roots)
        before, self._shares = self._shares, {module: root / mean for module, root in roots.items()}
        self._noise *= self._expected(self._shares) / self._expected(before)

    def _expected(self, shares: Mapping[str, float]) -> float:
        """Noise with these shares of a c of 1, in the unit of `_alone`."""
        return math.fsum(alone / shares.get(module, 1.0) ** _SLOPE for module, alone in self._alone.items())

    def state_dict(self) -> dict[str, Any]:
        return {
            "c": self._c,
            "noise": self._noise,
            "spread": self._spread,
            "probes": self._probes,
            "alone": dict(self._alone),
            "shares": dict(self._shares),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` had returned, of older versions too.

        Raises:
            TypeError, ValueError: a value is none that this schedule can have had; nothing is changed then.
        """
        saved = Saved(state, type(self).__name__)
        c = saved.read("c", partial(check_number, finite=True), self._c)
        probes = saved.read("probes", check_count, self._probes)
        noise = saved.read("noise", check_amount, self._noise)
        spread = saved.read("spread", check_amount, self._spread)
        if probes and not spread:
            raise ValueError(f"the saved state of {type(self).__name__}: spread must be above 0 after probes")
        alone = saved.read_dict("alone", check_name, check_amount, self._alone)
        shares = saved.read_dict("shares", check_name, partial(check_number, finite=True), self._shares)
        self._c, self._probes, self._noise, self._spread = c, probes, noise, spread
        self._alone, self._shares = alone, shares
