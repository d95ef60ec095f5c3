"""AutoC: the schedule that chooses c for the most progress per second, from measured times and variances."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from sus_lightning.adaptive import AT, Adaptive
from sus_lightning.landscape import Estimate, Landscape, Pass, Probed
from sus_lightning.saved import Check, Saved, check_bool, check_finite, check_list, check_record, optional, without_nan
from sus_lightning.schedules import check_amount, check_count, check_number

_REMEMBERED = 64  # probes
_PER_OCTAVE = 4  # values of c that are compared
_FULL = 0.98  # of all entries
_BETTER, _DOUBT = 0.01, 0.15  # of progress per second: c stays where less is to be gained, more if that is uncertain
_LEAVE, _RETURN = 0.01, 0.02  # gain over the exact backward below which SUS is left, above which it is taken again
_FEW = 6  # probes
_SURE = 0.05  # settled at infinity: what SUS could still gain, with its error


class AutoC(Adaptive):
    """Chooses c for the most progress per second: the ``c="auto"`` of `SUSBackprop`.

    A larger c costs time, a smaller one gradient noise, and noise costs steps. With t(c) the time of a training step's
    forward and backward, r(c) the relative variance and x the gradient noise scale in batches of a step, progress per
    second is proportional to:

        1 / (t(c) * (1 + r(c) * x / (1 + x)))

    t, r and x come from the probes, which measure at c and, to learn t and r as functions, at one or two other c that
    training does not use: `landscape` says how. Where x cannot be estimated it is taken as infinite. After each probe c
    moves by at most the factor `largest_step`, and only for a gain of 1% or more. Where the exact backward makes as
    much progress, c is infinity, until probes say otherwise.

    Note:
        c depends on measured times, so two runs do not have the same c. It is equal on all ranks, and the state in a
        checkpoint is complete.

    Args:
        on: what r is: "total", over all parameters; or "worst", the largest among the q, k, v and o projections of all
            layers: Adam scales each parameter by itself.
        per: "model" is one c for all; "layer" is one for each attention module, with c as their mean.
        start: c until the first probe.
        minimum: lower bound of c.
        maximum: upper bound of c, at least `minimum`; besides it c may be infinity.
        largest_step: c changes by at most this factor per probe, above 1; to infinity in one step.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> schedule = AutoC(start=256)
        >>> probe = {"sus_variance": 0.01, "batch_variance": 1.0, "step_seconds": 0.6, "exact_step_seconds": 1.0}
        >>> schedule.observe({**probe, "at/64.0/sus_variance": 0.04, "at/64.0/step_seconds": 0.5})
        >>> schedule(1)
        64.0
    """

    def __init__(
        self,
        on: str = "total",
        per: str = "model",
        start: float = 256.0,
        minimum: float = 16.0,
        maximum: float = 4096.0,
        largest_step: float = 4.0,
    ) -> None:
        super().__init__(on, per, start, minimum, maximum, largest_step, smoothing=0.5)
        self._finite = self.start  # the best c that is not infinity
        self._probes: list[Probed] = []
        self._switches = 0  # changes between finite and infinite c

    def reset(self) -> None:
        """Forgets all probes, as for another model."""
        self.__init__(self.on, self.per, self.start, self.minimum, self.maximum, self.largest_step)  # type: ignore[misc]

    def measure_at(self) -> list[float]:
        """The c, besides the one in use, at which the next probe is to measure: all finite.

        At first far below, since nothing is known; then on both sides in turn, and now and then far away, where a time
        that is no line in c may hide something better.
        """
        if not self._count:
            wanted = [self._finite / 4, self._finite / 16]
        else:
            factors = (0.5, 2.0, 0.5, 2.0, 0.25, 2.0, 0.5, 4.0)
            wanted = [self._finite * factors[self._count % len(factors)]]
            if math.isinf(self._c):
                wanted.append(self._finite)
        bounded = [min(self.maximum, max(self.minimum, c)) for c in wanted]
        found = [c for c in dict.fromkeys(bounded) if c != self._c]
        return found or [c for c in (min(self.maximum, 2 * self._finite),) if c != self._c]

    def observe(self, variance: Mapping[str, float]) -> None:
        """Takes the values of a probe, and chooses c.

        Args:
            variance: what `GradientVariance` computes, ``squared_gradient``, ``step_seconds`` and
                ``exact_step_seconds`` (and how many passes each is the median of: ``step_samples``,
                ``exact_step_samples``), ``kept_per_row``, ``kept_fraction``; those at another c have their name behind
                ``at/<c>/``. What is missing or not finite is not used.
        """
        probed = self._probed(variance)
        if not any(p.seconds > 0 for p in probed.passes) and not any(p.variance >= 0 for p in probed.passes):
            return
        self._probes = [*self._probes, probed][-_REMEMBERED:]
        self._count += 1
        factor = self._share(variance, probed.spread)
        if factor != 1:  # what was measured with other shares, as it would have been with these
            self._probes = [
                replace(probe, passes=tuple(replace(p, variance=p.variance * factor) for p in probe.passes))
                for probe in self._probes
            ]
        self._choose()

    @property
    def expected(self) -> Estimate | None:
        """What the probes say about the best finite c; None before the first one."""
        return Landscape(self._probes, self._finite).at(self._finite) if self._probes else None

    @property
    def gains_nothing(self) -> bool:
        """Whether it has settled at infinity."""
        if not math.isinf(self._c) or self._count < 3:
            return False
        best = self.expected
        return best is not None and (best.gain + 2 * best.error < _SURE or self._count >= 12)

    def verdict(self, keys: int = 0, backward_share: float = math.nan) -> str:
        """Why it has settled at infinity, in one line.

        Args:
            keys: of an attention row.
            backward_share: of attention's backward in a training step, 0 to 1.
        """
        at = f" at n = {keys}" if keys else ""
        if backward_share < 1 - 1 / (1 + _SURE):
            return f"SUS would not speed this model up{at}: attention's backward is {backward_share:.0%} of a step"
        if not self._probes:
            return f"SUS would not speed this model up{at}"
        landscape = Landscape(self._probes, self._finite)
        if landscape.full_from <= min(p.c for probe in self._probes for p in probe.passes):
            return f"SUS would not speed this model up{at}: at c = {landscape.full_from:g} all entries are kept already"
        best = landscape.at(self._finite)
        return (
            f"SUS would not speed this model up{at}: at c = {self._finite:g}, the best, a step takes "
            f"{math.exp(best.log_time):.2f} of the exact one's time and training needs "
            f"{math.exp(best.log_penalty):.2f} times as many steps"
            + (f" (attention's backward is {backward_share:.0%} of a step)" if backward_share >= 0 else "")
        )

    def _choose(self) -> None:
        landscape = Landscape(self._probes, self._finite)
        tried = [p.c for probe in self._probes for p in probe.passes] + [self._finite]
        low, high = max(self.minimum, min(tried) / 2), min(self.maximum, max(tried) * 2)  # no guess beyond these
        estimates = {c: landscape.at(c) for c in _grid(self.minimum, self.maximum) if low <= c <= high}
        best, there = max(estimates.items(), key=lambda item: item[1].gain)
        if there.gain > landscape.at(self._finite).gain + _BETTER + _DOUBT * there.error:
            self._finite = self._next(self._finite, best)
        else:
            there = landscape.at(self._finite)
        if not any(p.seconds > 0 for probe in self._probes for p in probe.passes):
            return  # nothing is known about time
        # Neither left nor taken again on noise: few probes have to show it beyond their error, many by less and less of
        # it, since either may be wrong then. Each change of mind asks for more.
        doubt = there.error * max(1.0 if self._count < _FEW else 0.5 * _FEW / self._count, 0.5 * self._switches)
        exact = math.isinf(self._c)
        full = self._finite >= landscape.full_from  # nothing is left out: a gain is the least likely thing
        doubt = max(doubt, 2 * there.error) if full else doubt
        leave = there.gain - doubt <= _RETURN if exact or full else there.gain + doubt < _LEAVE
        self._switches += leave != exact
        self._c = math.inf if leave else self._finite

    def _probed(self, values: Mapping[str, float]) -> Probed:
        others: dict[str, dict[str, float]] = {}
        for name, value in values.items():
            if name.startswith(AT):
                c, _, inner = name.removeprefix(AT).partition("/")
                others.setdefault(c, {})[inner] = value
        passes = [self._pass(float(c), at, values) for c, at in others.items()]
        if not math.isinf(self._c):
            passes.insert(0, self._pass(self._c, values, values))
        return Probed(
            tuple(passes),
            values.get("batch_variance", math.nan),
            values.get("squared_gradient", math.nan),
            _samples(values.get("exact_step_samples", 1)),
        )

    def _pass(self, c: float, at: Mapping[str, float], values: Mapping[str, float]) -> Pass:
        exact = values.get("exact_step_seconds", math.nan)
        seconds = at.get("step_seconds", math.nan)
        return Pass(
            c,
            self._noise(at, values.get("batch_variance", math.nan)),
            seconds / exact if exact > 0 and seconds > 0 and math.isfinite(seconds / exact) else math.nan,
            _samples(at.get("step_samples", 1)),
            at.get("kept_per_row", math.nan),
            at.get("kept_fraction", 0.0) > _FULL,
        )

    def state_dict(self) -> dict[str, Any]:
        probes = [without_nan(asdict(probe)) for probe in self._probes]
        return {**super().state_dict(), "finite": self._finite, "switches": self._switches, "probes": probes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` had returned.

        Raises:
            TypeError, ValueError: a value is none that this schedule can have had; nothing is changed then.
        """
        saved = Saved(state, type(self).__name__)
        read = self._read(saved, finite=False)
        read["_finite"] = self._within(saved.read("finite", _POSITIVE, self._finite))
        read["_switches"] = saved.read("switches", check_count, 0)
        none: list[Probed] = []
        read["_probes"] = saved.read("probes", partial(check_list, _check_probe), none)
        vars(self).update(read)


_POSITIVE = partial(check_number, finite=True)
_SAMPLES = partial(check_count, at_least=1)
_PASS: dict[str, Check] = {
    "c": _POSITIVE,
    "variance": optional(check_amount),
    "seconds": optional(_POSITIVE),
    "samples": _SAMPLES,
    "kept": optional(check_amount),
    "full": check_bool,
}
_PROBED: dict[str, Check] = {
    "passes": partial(check_list, partial(check_record, _PASS, ("c", "variance", "seconds"))),
    "spread": optional(check_amount),
    "squared_gradient": optional(check_finite),
    "exact_samples": _SAMPLES,
}


def _check_probe(name: str, value: Any) -> Probed:
    read = check_record(_PROBED, ("passes", "spread"), name, value)
    return Probed(**{**read, "passes": tuple(Pass(**one) for one in read["passes"])})


def _samples(value: float) -> int:
    return max(1, int(value)) if math.isfinite(value) else 1


def _grid(minimum: float, maximum: float) -> list[float]:
    low = math.ceil(_PER_OCTAVE * math.log2(minimum))
    high = math.floor(_PER_OCTAVE * math.log2(maximum))
    values = [round(2 ** (i / _PER_OCTAVE), 6) for i in range(low, high + 1)]
    return sorted({minimum, *values, maximum})
