"""VarianceTarget: the schedule that finds c by itself, from the measured gradient variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sus_lightning.adaptive import Adaptive
from sus_lightning.landscape import SLOPE
from sus_lightning.saved import Saved
from sus_lightning.schedules import check_amount, check_count, check_number


class VarianceTarget(Adaptive):
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
        self.smoothing = check_number("smoothing", smoothing)
        if self.smoothing > 1:
            raise ValueError(f"smoothing must be in (0, 1], but it is {smoothing}")
        super().__init__(on, per, start, minimum, maximum, largest_step, self.smoothing)
        self._at_one = self._spread = 0.0  # averages: the variance that SUS would add at c = 1, and the batch's own

    def observe(self, variance: Mapping[str, float]) -> None:
        spread = variance.get("batch_variance", math.nan)
        noise = self._noise(variance, spread)
        if not (math.isfinite(noise) and math.isfinite(spread) and spread > 0):
            return  # no batch variance to compare with: keep c
        weight = self.smoothing if self._count else 1.0
        # The exponent is what was measured on a byte LM (c = 8 .. 64) and on SmolLM2-135M (c = 30 .. 150). Only the
        # speed of the loop depends on it, not where it settles.
        self._at_one += weight * (noise * self._c**SLOPE - self._at_one)
        self._spread += weight * (spread - self._spread)
        self._at_one *= self._share(variance, self._spread)
        self._c = self._next(self._c, (self._at_one / self._spread / self.target) ** (1 / SLOPE))
        self._count += 1

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {"probes": state.pop("count"), "noise": self._at_one, "spread": self._spread, **state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` had returned, of older versions too.

        Raises:
            TypeError, ValueError: a value is none that this schedule can have had; nothing is changed then.
        """
        saved = Saved(state, type(self).__name__)
        read = self._read(saved, finite=True)
        read["_count"] = saved.read("probes", check_count, self._count)
        read["_at_one"] = saved.read("noise", check_amount, self._at_one)
        read["_spread"] = saved.read("spread", check_amount, self._spread)
        if read["_count"] and not read["_spread"]:
            raise ValueError(f"the saved state of {type(self).__name__}: spread must be above 0 after probes")
        vars(self).update(read)
