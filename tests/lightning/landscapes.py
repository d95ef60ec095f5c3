"""Simulated landscapes: what a probe would measure where time, variance and noise scale are known functions of c."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from statistics import median

from sus_lightning.landscape import penalty


@dataclass
class World:
    """Time of a step relative to the exact one, relative variance, noise scale, and how noisy the probes are.

    Attributes:
        rest, per_entry: the time is ``rest + per_entry * kept``.
        at_one, slope: the relative variance is ``at_one * c ** -slope``.
        noise_scale: in batches; infinite where the true gradient is 0.
        keys: mean number of keys of a row.
        growth: kept entries are ``c ** growth``, at most `keys`.
        dense_from: kept entries above which the exact backward runs.
        timing_noise: standard deviation of the logarithm of each pass's time.
        variance_noise: the same of the variances.
        says_kept: whether the probe knows the kept entries.
        outliers: share of the passes that take ten times as long.
    """

    rest: float
    per_entry: float
    at_one: float
    slope: float
    noise_scale: float
    keys: float
    growth: float = 1.0
    dense_from: float = math.inf
    timing_noise: float = 0.0
    variance_noise: float = 0.0
    says_kept: bool = True
    outliers: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def kept(self, c: float) -> float:
        return min(self.keys, c**self.growth)

    def is_dense(self, c: float) -> bool:
        return math.isinf(c) or self.kept(c) > self.dense_from

    def time(self, c: float) -> float:
        return 1.0 if self.is_dense(c) else self.rest + self.per_entry * self.kept(c)

    def relative_variance(self, c: float) -> float:
        return 0.0 if self.is_dense(c) else self.at_one * c**-self.slope

    def cost(self, c: float) -> float:
        """Logarithm of the seconds for the same progress, relative to the exact backward."""
        return math.log(self.time(c) * penalty(self.relative_variance(c), self.noise_scale))

    def best(self, minimum: float, maximum: float) -> float:
        c = [minimum * (maximum / minimum) ** (i / 300) for i in range(301)]
        return min([*c, math.inf], key=self.cost)

    def probe(self, c: float, others: list[float]) -> dict[str, float]:
        """As `Probe` returns it: two exact passes, one SUS pass at each c, eight training steps before it at c."""
        batch = self._scatter(self.variance_noise)
        squared = 0.0 if math.isinf(self.noise_scale) else 1 / self.noise_scale
        exact = median(self._pass(1.0) for _ in range(2))
        values = {
            "batch_variance": self._scatter(self.variance_noise),
            "squared_gradient": squared + self.variance_noise * self._rng.gauss(0, squared + 0.1),
            "exact_step_seconds": exact,
            "exact_step_samples": 2.0,
        }
        for at in (c, *others):
            name, passes = ("", 9) if at == c else (f"at/{at!r}/", 1)
            values[name + "sus_variance"] = self.relative_variance(at) * batch * self._scatter(self.variance_noise / 2)
            values[name + "step_seconds"] = median(self._pass(self.time(at)) for _ in range(passes))
            values[name + "step_samples"] = float(passes)
            if self.says_kept:
                kept = self.keys if self.is_dense(at) else self.kept(at)
                values |= {f"{name}kept_per_row": kept, f"{name}kept_fraction": kept / self.keys}
        return values

    def _pass(self, seconds: float) -> float:
        slow = 10.0 if self._rng.random() < self.outliers else 1.0
        return seconds * slow * self._scatter(self.timing_noise)

    def _scatter(self, deviation: float) -> float:
        return math.exp(self._rng.gauss(0, deviation))


def random_world(seed: int, **noise: float | bool) -> World:
    """Anything that was seen or is to be feared, from a free lunch to nothing at all to gain."""
    rng = random.Random(seed)
    keys = 2.0 ** rng.uniform(8, 14)
    slope, share = rng.uniform(0.8, 2.0), rng.uniform(0.02, 0.8)  # of attention's backward in an exact step
    return World(
        rest=1 - share + rng.uniform(0, 0.15),  # sampling costs time too
        per_entry=rng.uniform(0.5, 4) * share / keys,  # an entry costs half as much as a dense one, or four times
        at_one=10 ** rng.uniform(-3, -0.7) * 30**slope,  # at c = 30: 0.1% to 20%
        slope=slope,
        noise_scale=10 ** rng.uniform(-1.5, 2.5),
        keys=keys,
        growth=rng.uniform(0.6, 1.0),
        dense_from=keys * rng.uniform(0.1, 0.5) if rng.random() < 0.5 else math.inf,
        seed=seed,
        **noise,  # type: ignore[arg-type]
    )
