"""What probes say about any c: time of a step, added variance, and how much training advances in a second.

All times are relative to the exact backward's (1 is as fast as exact), measured in the same probe, so that a machine
that is busy now and idle later changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Relative variance falls about as c ** -1.5 (docs/metrics.md); how well that is known, as a standard deviation.
SLOPE, _SLOPE_KNOWN = 1.5, 0.4
_SLOPES = tuple(0.3 + 0.1 * i for i in range(28))
# The sparse part's share of the time at 64 kept entries, over that of the rest: from nothing to 20 times.
_SPARSE = (0.0, *(0.005 * 1.4**i for i in range(25)))
_KEPT = 64.0
_HALF_LIFE_VARIANCE, _HALF_LIFE_TIME = 8.0, 32.0  # in probes: attention sharpens, machines stay
_NEAR = math.log(6.0)  # points within this factor of c count most: times and variances are simple only nearby
_FAR = 0.02  # weight of points far away
_LINE = 0.8  # probability that the time is a line for all c that were tried
_STUDENT = 3.0  # degrees of freedom: a pass that took ten times as long says little


def penalty(relative_variance: float, noise_scale: float) -> float:
    """How many times as many steps training needs where SUS adds variance: 1 + r x / (1 + x).

    The number of steps to a loss grows as 1 + x with the gradient noise scale x (in batches of one step; An Empirical
    Model of Large-Batch Training, arXiv 1812.06162), and a relative variance r makes x larger by the factor 1 + r.

    Args:
        relative_variance: r, at least 0.
        noise_scale: x; where it is not known (NaN, or below 0) it is taken as infinite, the largest penalty.

    Examples:
        >>> penalty(0.1, 1.0), penalty(0.1, float("nan"))
        (1.05, 1.1)
    """
    share = 1.0 if not noise_scale >= 0 or math.isinf(noise_scale) else noise_scale / (1 + noise_scale)
    return 1 + relative_variance * share


@dataclass(frozen=True)
class Pass:
    """One c in one probe.

    Attributes:
        c: finite and above 0.
        variance: that SUS added to the gradient, squared; NaN where not measured.
        seconds: of a forward and backward, over the exact backward's in the same probe; NaN where not measured.
        samples: passes that `seconds` is the median of.
        kept: kept entries per query row; NaN where not known.
        full: nearly all entries were kept, or the exact backward ran since most would have been: neither time nor
            variance says anything about a smaller c.
    """

    c: float
    variance: float
    seconds: float
    samples: int = 1
    kept: float = math.nan
    full: bool = False


@dataclass(frozen=True)
class Probed:
    """One probe.

    Attributes:
        passes: one for each c that was measured, at least one.
        spread: the batch gradient's variance.
        squared_gradient: unbiased estimate of the true gradient's square: may be negative.
        exact_samples: exact passes whose median the times are relative to.
    """

    passes: tuple[Pass, ...]
    spread: float
    squared_gradient: float = math.nan
    exact_samples: int = 1


@dataclass(frozen=True)
class Estimate:
    """At one c: log of the relative time and of the penalty, and the standard error of the former."""

    log_time: float
    log_penalty: float
    error: float

    @property
    def gain(self) -> float:
        """Progress per second over the exact backward's, as a logarithm."""
        return -self.log_time - self.log_penalty


class Landscape:
    """Time and variance as functions of c, fitted to probes.

    Time: a line in the kept entries, ``a + b * kept(c)``, up to some c, and one level from there on, as where the exact
    backward runs instead; from the smallest c on at which all were kept it is surely that. Variance: ``A * c ** -p``.
    Neither b / a nor the end of the line nor p is known from a few noisy probes, so that estimates are averages over
    their likely values, for the time by a likelihood with heavy tails, for p from the noise's own scatter. Both count
    points near `center` most, and are then only required to hold there.

    Args:
        probes: the oldest first, at least one.
        center: the c in use or of interest.

    Attributes:
        noise_scale: in batches of a step; NaN where it is not known.
        full_from: the smallest c at which nearly all entries were kept; infinite where there was none.
    """

    def __init__(self, probes: Sequence[Probed], center: float) -> None:
        self.noise_scale = average_noise_scale([(p.spread, p.squared_gradient) for p in probes])
        self._kept = _Kept(point for probe in probes for point in probe.passes)
        self.full_from, self._full = _fit_full(probes)
        self._variances = _fit_variance(probes, center)
        self._times, self._error = self._fit_time(probes, center)

    def at(self, c: float) -> Estimate:
        """What is to be expected at c; infinity is the exact backward."""
        if math.isinf(c):
            return Estimate(0.0, 0.0, self._error)
        log_penalty = sum(w * math.log(penalty(a * c**-p, self.noise_scale)) for w, p, a in self._variances)
        if c >= self.full_from:
            return Estimate(self._full[0], log_penalty, self._full[1])
        if not self._times:
            return Estimate(0.0, log_penalty, self._error)
        kept = self._kept(c) / _KEPT
        logs = [(shape.weight, shape.log_time(c, kept)) for shape in self._times]
        mean = sum(w * value for w, value in logs)
        variance = sum(w * (value - mean) ** 2 for w, value in logs)
        return Estimate(mean, log_penalty, math.sqrt(self._error**2 + variance))

    def relative_variance(self, c: float) -> float:
        return 0.0 if math.isinf(c) else sum(w * a * c**-p for w, p, a in self._variances)

    def _fit_time(self, probes: Sequence[Probed], center: float) -> tuple[list[_Shape], float]:
        """The likely shapes, and the standard error of the level."""
        rows: list[tuple[float, float, float, float, float, float]] = []
        exact: list[tuple[float, float]] = []
        for age, probe in enumerate(reversed(probes)):
            used = [p for p in probe.passes if 0 < p.seconds < math.inf and not p.full]
            if not used:
                continue
            old = 0.5 ** (age / _HALF_LIFE_TIME)
            for p in used:
                kept = self._kept(p.c) / _KEPT
                counts = old * _nearness(p.c, center)
                rows.append((len(exact), counts, _effective(p.samples), p.c, kept, math.log(p.seconds)))
            exact.append((old, _effective(probe.exact_samples)))
        if not rows:
            return [], math.inf
        points = _Points(
            *torch.tensor(rows, dtype=torch.float64).unbind(1), *torch.tensor(exact, dtype=torch.float64).unbind(1)
        )
        sigma = 0.1
        for _ in range(3):
            shapes, sigma, error = _shapes(points, sigma)
        return shapes, error


@dataclass(frozen=True)
class _Shape:
    """One possible time: ``level + log(1 + sparse * kept)`` below `end`, and the exact backward's from there on."""

    weight: float  # its probability
    sparse: float
    level: float
    end: float

    def log_time(self, c: float, kept: float) -> float:
        return 0.0 if c >= self.end else self.level + math.log1p(self.sparse * kept)


@dataclass(frozen=True)
class _Points:
    """Times of passes, as logarithms over the exact backward's of their probe.

    Args:
        probe: number of the probe, [points].
        counts: how much a point counts, 0 to 1, [points].
        samples: passes that it is as good as, [points].
        c, kept, times: [points]; kept entries over `_KEPT`.
        exact_counts, exact_samples: the same of the exact passes, [probes].
    """

    probe: Tensor
    counts: Tensor
    samples: Tensor
    c: Tensor
    kept: Tensor
    times: Tensor
    exact_counts: Tensor
    exact_samples: Tensor

    def fit(self, lines: Tensor, below: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of each shape: its level, log likelihood, sum of squares and precision of the level.

        The exact passes of a probe are off by something that all its points share. With given weights of points and
        exact passes, levels and these offsets are a weighted mean; the weights are Student's.

        Args:
            lines: the logarithm of the time but for its level, [shapes, points].
            below: whether the level is part of a point's time, [points]; else it is the exact backward's.
            sigma: scatter of the logarithm of one pass.
        """
        rest = self.times - lines
        shapes, probes = len(lines), len(self.exact_counts)
        index = self.probe.long().expand(shapes, -1)
        level = rest.new_zeros(shapes, 1)
        if bool(below.any()):
            level = rest[:, below].median(1, keepdim=True).values
        offset = rest.new_zeros(shapes, probes)
        spread = sigma**2 * _STUDENT

        def per_probe(values: Tensor) -> Tensor:
            return values.new_zeros(shapes, probes).scatter_add_(1, index, values)

        for _ in range(4):
            off = rest - level * below - offset.gather(1, index)
            weight = self.counts * self.samples / (1 + self.samples * off.square() / spread)
            whole = self.exact_counts * self.exact_samples / (1 + self.exact_samples * offset.square() / spread)
            # Without the offset, by the inverse of a probe's covariance.
            own = per_probe(weight * below)
            share = own / (per_probe(weight) + whole)
            means = per_probe(weight * rest)
            top = per_probe(weight * rest * below) - share * means
            precision = (own - share * own).sum(1, keepdim=True)
            if bool(below.any()):
                level = top.sum(1, keepdim=True) / precision
            offset = per_probe(weight * (rest - level * below)) / (per_probe(weight) + whole)
        off = rest - level * below - offset.gather(1, index)
        squares, common = self.samples * off.square(), self.exact_samples * offset.square()
        tail = (self.counts * torch.log1p(squares / spread)).sum(1) + (
            self.exact_counts * torch.log1p(common / spread)
        ).sum(1)
        limit = 9 * sigma**2
        total = (self.counts * squares.clamp(max=limit)).sum(1) + (self.exact_counts * common.clamp(max=limit)).sum(1)
        return level[:, 0], -(_STUDENT + 1) / 2 * tail, total, precision[:, 0]


def _shapes(points: _Points, sigma: float) -> tuple[list[_Shape], float, float]:
    """The likely shapes of the time with a given scatter of a pass, a better value of it, and the level's error."""
    lines = torch.log1p(torch.tensor(_SPARSE, dtype=torch.float64)[:, None] * points.kept)
    tried = sorted(set(points.c.tolist()))
    ends = [math.inf, *(math.sqrt(a * b) for a, b in pairwise(tried))]
    found: list[tuple[float, float, float, float]] = []
    best, scatter, error = -math.inf, sigma, math.inf
    for end in ends:
        below = points.c < end
        level, likely, squares, precision = points.fit(lines * below, below, sigma)
        likely = likely + math.log(_LINE if math.isinf(end) else (1 - _LINE) / (len(ends) - 1))
        found += zip(likely.tolist(), _SPARSE, level.tolist(), [end] * len(_SPARSE), strict=True)
        i = int(likely.argmax())
        if float(likely[i]) > best:
            best = float(likely[i])
            # The prior: two passes with a scatter of 10%.
            scatter = math.sqrt((float(squares[i]) + 2 * 0.01) / (float(points.counts.sum()) + 2))
            error = sigma / math.sqrt(float(precision[i]))
    total = sum(math.exp(likely - best) for likely, *_ in found)
    shapes = [_Shape(math.exp(likely - best) / total, *rest) for likely, *rest in found if likely > best - 9]
    return shapes, scatter, error


def _fit_full(probes: Sequence[Probed]) -> tuple[float, tuple[float, float]]:
    """The smallest c at which all was kept, and log of the time from there on with its standard error."""
    full = [(p, probe) for probe in probes for p in probe.passes if p.full and 0 < p.seconds < math.inf]
    if not full:
        return math.inf, (0.0, math.inf)
    points = [
        (1 / (1 / _effective(p.samples) + 1 / _effective(probe.exact_samples)), math.log(p.seconds))
        for p, probe in full
    ]
    level, total = _weighted_median(points), sum(w for w, _ in points)
    scatter = (sum(w * min((y - level) ** 2, 0.25) for w, y in points) + 2 * 0.01) / (total + 2)
    return min(p.c for p, _ in full), (level, math.sqrt(scatter / total))


class _Kept:
    """Kept entries per row at any c: between the measured ones along a power law; c itself where none was measured."""

    def __init__(self, points: Iterable[Pass]) -> None:
        by_c: dict[float, list[float]] = {}
        for p in points:
            if p.kept > 0 and not p.full:
                by_c.setdefault(p.c, []).append(math.log(p.kept))
        self._known = sorted((math.log(c), sum(logs) / len(logs)) for c, logs in by_c.items())

    def __call__(self, c: float) -> float:
        known, x = self._known, math.log(c)
        if not known:
            return c
        if len(known) == 1:
            return math.exp(known[0][1] + x - known[0][0])
        upper = next((i for i, (at, _) in enumerate(known) if at >= x), len(known) - 1)
        (x0, y0), (x1, y1) = known[max(upper, 1) - 1], known[max(upper, 1)]
        slope = min(1.0, max(0.0, (y1 - y0) / (x1 - x0)))  # kept(c) is at most proportional to c
        return math.exp(y0 + slope * (x - x0))


def _fit_variance(probes: Sequence[Probed], center: float) -> list[tuple[float, float, float]]:
    """(probability, p, A) with the relative variance A * c ** -p.

    Averages of variances, not of logarithms or ratios, which are biased where single probes scatter.
    """
    points: list[tuple[float, float, float]] = []  # weight, log c, variance
    spread = spreads = 0.0
    for age, probe in enumerate(reversed(probes)):
        old = 0.5 ** (age / _HALF_LIFE_VARIANCE)
        if probe.spread > 0 and math.isfinite(probe.spread):
            spread, spreads = spread + old * probe.spread, spreads + old
        for p in probe.passes:
            if math.isfinite(p.variance) and p.variance >= 0 and not p.full:
                points.append((old * _nearness(p.c, center), math.log(p.c), p.variance))
    if not points or not spread:
        return [(1.0, SLOPE, 0.0)]
    total = sum(w for w, _, _ in points)
    mean_log = sum(w * x for w, x, _ in points) / total
    fits, scatter = [], 0.2
    for slope in _SLOPES:
        a = sum(w * v * math.exp(slope * (x - mean_log)) for w, x, v in points) / total
        if not a > 0:
            return [(1.0, SLOPE, 0.0)]
        # Of a gamma distribution, whose standard deviation is proportional to its mean.
        likelihood = -total * math.log(a)
        squares = sum(w * (v * math.exp(slope * (x - mean_log)) / a - 1) ** 2 for w, x, v in points)
        fits.append((slope, a, likelihood, squares))
    scatter = (min(squares for *_, squares in fits) + 2 * scatter) / (total + 2)
    logs = [likelihood / scatter - ((slope - SLOPE) / _SLOPE_KNOWN) ** 2 / 2 for slope, _, likelihood, _ in fits]
    weights = [math.exp(value - max(logs)) for value in logs]
    unit = spread / spreads
    return [
        (w / sum(weights), slope, a * math.exp(slope * mean_log) / unit)
        for w, (slope, a, _, _) in zip(weights, fits, strict=True)
    ]


def average_noise_scale(probes: Sequence[tuple[float, float]]) -> float:
    """The gradient noise scale from the averages of the last probes, since single ones scatter.

    Args:
        probes: batch variance and unbiased estimate of the true gradient's square of each, the oldest first.

    Returns:
        In batches of one step; NaN where the average of the latter is not positive.
    """
    spread = product = 0.0
    for age, (variance, squared) in enumerate(reversed(probes)):
        if math.isfinite(squared) and math.isfinite(variance):
            old = 0.5 ** (age / _HALF_LIFE_VARIANCE)
            spread, product = spread + old * variance, product + old * squared
    return spread / product if product > 0 else math.nan


def _nearness(c: float, center: float) -> float:
    if math.isinf(center):
        return 1.0
    return _FAR + (1 - _FAR) * math.exp(-0.5 * (math.log(c / center) / _NEAR) ** 2)


def _effective(samples: int) -> float:
    """A median of many passes is not better than the machine is steady."""
    return min(1.0 if samples < 3 else 0.64 * samples, 8.0) if samples != 2 else 2.0


def _weighted_median(values: Iterable[tuple[float, float]]) -> float:
    ordered = sorted((value, weight) for weight, value in values)
    half, seen = sum(weight for _, weight in ordered) / 2, 0.0
    for value, weight in ordered:
        seen += weight
        if seen >= half:
            return value
    return ordered[-1][0]
