"""The account of a fit: what SUS did, what it gained, and what it cost, in one block and one picture."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fx_passes.state import shown
from sus_lightning.landscape import average_noise_scale, penalty
from sus_lightning.saved import Check, Saved, check_finite, check_list, check_real, check_record, optional, without_nan
from sus_lightning.schedules import check_amount, check_count, check_number
from sus_lightning.timing import compile_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_POINTS = 1000  # of a series; a longer one is thinned
_MEASURED = ("relative_variance", "worst_relative_variance", "batch_variance", "squared_gradient")
_LOGGED = (
    "relative_variance", "step_speedup", "step_speedup_low", "step_speedup_high", "net_speedup", "seconds",
    "probe_seconds", "compile_seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """What one fit did, gained and cost. What was not measured is NaN, and "not measured" in print.

    Attributes:
        rewritten: attention sites with a SUS backward.
        left: attention sites without.
        steps: optimizer steps.
        c: (step, c) where c changed, the first step included.
        kept_per_row: entries kept per query row.
        kept_fraction: entries kept, of all that a dense backward uses.
        relative_variance: by SUS, mean over the probes; of the batch's own.
        worst_relative_variance: mean over the probes of the largest among the attention projections.
        noise_scale: gradient noise scale in batches of one step, of the last probes.
        step_speedup: seconds of a step's forward and backward, exact over SUS: median of the probes at the last c, or
            of all where those are fewer than three.
        step_speedup_low: lower end of its 95% confidence interval, from the scatter of these probes. A speed-up is
            beyond the noise of its measurement where 1 is not in the interval.
        step_speedup_high: upper end.
        net_speedup: the same divided by the penalty for the variance.
        seconds: of the fit.
        probe_seconds: of these, in probes.
        compile_seconds: of these, in torch.compile.
        probes: how many there were.
    """

    rewritten: int
    left: int
    steps: int
    c: tuple[tuple[int, float], ...]
    kept_per_row: float
    kept_fraction: float
    relative_variance: float
    worst_relative_variance: float
    noise_scale: float
    step_speedup: float
    step_speedup_low: float
    step_speedup_high: float
    net_speedup: float
    seconds: float
    probe_seconds: float
    compile_seconds: float
    probes: int

    def numbers(self) -> dict[str, float]:
        """What is a number, for loggers; c is the last one."""
        values = {name: value for name, value in asdict(self).items() if name != "c"}
        return {name: float(v) for name, v in {**values, "c": self.c[-1][1] if self.c else math.nan}.items()}

    def logged(self) -> dict[str, float]:
        """What loggers get when fit ends: numbers to compare runs by that no other key has, where known."""
        numbers = self.numbers()
        return {f"summary_{name}": numbers[name] for name in _LOGGED if math.isfinite(numbers[name])}

    def _speedup(self) -> str:
        if math.isnan(self.step_speedup):
            return "not measured"
        if self.step_speedup_low == self.step_speedup_high:
            return "none: c = inf is the exact backward"
        interval = f"{self.step_speedup_low:.2f}x to {self.step_speedup_high:.2f}x"
        if self.step_speedup_high < 1:
            return f"none: {self.step_speedup:.2f}x, slower than the exact backward (95% from {interval})"
        if self.step_speedup_low <= 1:
            return f"none beyond the noise: {self.step_speedup:.2f}x measured (95% from {interval})"
        return f"{self.step_speedup:.2f}x (forward and backward; 95% from {interval})"

    def __str__(self) -> str:
        training = self.seconds - self.compile_seconds if self.compile_seconds >= 0 else self.seconds
        share = f" ({self.probe_seconds / training:.1%} of training)" if training > 0 else ""
        rows = [
            ("attentions", f"{self.rewritten} of {self.rewritten + self.left} with a SUS backward"),
            ("c", _path(self.c)),
            ("kept entries", _said(self.kept_per_row, "{:.1f} per row, ") + _said(self.kept_fraction, "{:.2%} of all")),
            (
                "added variance",
                _said(self.relative_variance, "{:.2%} of the batch's own")
                + "; "
                + _said(self.worst_relative_variance, "worst kind {:.2%}", "kinds not known"),
            ),
            ("speed-up of a step", self._speedup()),
            (
                "net of the variance",
                _said(self.net_speedup, "{:.2f}x")
                + " (noise scale "
                + _said(self.noise_scale, "{:.3g})", "not known)"),
            ),
            ("time", f"{_time(self.seconds)} for {self.steps} steps"),
            ("  in probes", f"{_time(self.probe_seconds)} for {self.probes}{share}"),
            ("  in compilation", _said(self.compile_seconds, "{}", formatted=_time)),
        ]
        return "\n".join(["SUS backprop in this fit:", *(f"  {name:20} {text}" for name, text in rows)])


@dataclass
class Account:
    """Collects, while a fit runs, what its `Summary` and picture are made of.

    Attributes:
        probes: what each probe gave: step, c, relative_variance, step_speedup and so on.
        c: (step, c) where c changed.
        losses: (step, loss) at the steps that are logged.
    """

    probes: list[dict[str, float]] = field(default_factory=list)
    c: list[tuple[int, float]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    entries: float = 0.0
    rows: float = 0.0
    dense: float = 0.0
    seconds: float = 0.0
    probe_seconds: float = 0.0
    compile_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._running: tuple[float, float] | None = None

    def start(self) -> None:
        """The clock of the fit runs."""
        self._running = time.perf_counter(), compile_seconds()

    def stop(self) -> None:
        """The clock stops; it may be started again."""
        vars(self).update(self._elapsed())
        self._running = None

    def note_c(self, step: int, c: float) -> None:
        if not self.c or self.c[-1][1] != c:
            self.c.append((step, c))
            _thin(self.c)

    def note_loss(self, step: int, outputs: Any) -> None:
        """Takes what a training step gave, where that is a loss or holds one."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self.losses.append((step, float(loss)))
            _thin(self.losses)

    def note_kept(self, entries: float, rows: float, dense: float) -> None:
        self.entries, self.rows, self.dense = self.entries + entries, self.rows + rows, self.dense + dense

    def note_probe(self, step: int, c: float, values: Mapping[str, float], on: str = "total") -> dict[str, float]:
        """Takes the values of a probe; returns ``step_speedup`` and ``net_speedup``, what is to be logged besides.

        Args:
            step: optimizer steps so far.
            c: at which it measured.
            values: what `Probe` returned.
            on: "worst" where the penalty is that of the worst attention kind.
        """
        probe = {"step": float(step), "c": c} | {name: values.get(name, math.nan) for name in _MEASURED}
        self.probe_seconds += values.get("probe_seconds", 0.0)
        speedup = values.get("exact_step_seconds", math.nan) / (values.get("step_seconds", math.nan) or math.nan)
        variance = probe["worst_relative_variance" if on == "worst" else "relative_variance"]
        self.probes.append(probe)
        speedups = {"step_speedup": 1.0, "net_speedup": 1.0}  # c = inf is the exact backward
        if not math.isinf(c):
            speedups = {"step_speedup": speedup, "net_speedup": speedup / penalty(variance, self.noise_scale)}
        probe.update(speedups)
        _thin(self.probes)
        return {name: value for name, value in speedups.items() if math.isfinite(value)}

    @property
    def noise_scale(self) -> float:
        """Of the last probes, in batches of a step; NaN where it cannot be told."""
        return average_noise_scale([(p["batch_variance"], p["squared_gradient"]) for p in self.probes])

    def _last(self) -> list[dict[str, float]]:
        """The probes that say what SUS gains now: at about the last c, or all where those are few."""
        at = self.probes[-1]["c"] if self.probes else math.nan
        last = [p for p in self.probes if p["c"] == at or abs(p["c"] - at) < 0.05 * at]
        return last if len(last) >= 3 or math.isinf(at) else self.probes

    def summary(self, rewritten: int, left: int, steps: int) -> Summary:
        last = self._last()
        low, high = interval([p["step_speedup"] for p in last if math.isfinite(p["step_speedup"])])
        return Summary(
            rewritten=rewritten,
            left=left,
            steps=steps,
            c=tuple(self.c),
            kept_per_row=self.entries / self.rows if self.rows else math.nan,
            kept_fraction=self.entries / self.dense if self.dense else math.nan,
            relative_variance=_mean(self.series("relative_variance")),
            worst_relative_variance=_mean(self.series("worst_relative_variance")),
            noise_scale=self.noise_scale,
            step_speedup=_median([p["step_speedup"] for p in last]),
            step_speedup_low=low,
            step_speedup_high=high,
            net_speedup=_median([p["net_speedup"] for p in last]),
            seconds=self.seconds,
            probe_seconds=self.probe_seconds,
            compile_seconds=self.compile_seconds,
            probes=len(self.probes),
        )

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) over the probes, where it is finite."""
        return [(int(p["step"]), p[name]) for p in self.probes if math.isfinite(p[name])]

    def state_dict(self) -> dict[str, Any]:
        saved: dict[str, Any] = asdict(self) | self._elapsed()
        for name in ("probes", "compile_seconds"):
            saved[name] = without_nan(saved[name])
        return saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` had returned, of older versions too.

        Raises:
            TypeError, ValueError: a value is none that an account can have had; nothing is changed then.
        """
        vars(self).update(Saved(state, "the account").read_all(_CHECKS))
        self._running = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the clock, whose moments are of this process and of a fit that the copy is not part of."""
        return {**vars(self), **self._elapsed(), "_running": None}

    def _elapsed(self) -> dict[str, float]:
        seconds, compiled = self.seconds, self.compile_seconds
        if self._running is not None:
            began, before = self._running
            now = compile_seconds()
            seconds += time.perf_counter() - began
            compiled += now if now < before else now - before  # torch._dynamo.reset() sets it to 0
        return {"seconds": seconds, "compile_seconds": compiled}


def _check_series(check: Check, name: str, value: Any) -> list[tuple[int, float]]:
    if not isinstance(value, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in value):
        raise TypeError(f"{name} must be a list of pairs of a step and a number, but it is {shown(value)}")
    return [(check_count(f"a step of {name}", step), check(f"{name} at step {step}", y)) for step, y in value]


_PROBE: dict[str, Check] = {
    "step": check_amount,
    "c": check_number,
    "relative_variance": optional(check_amount),
    "worst_relative_variance": optional(check_amount),
    "batch_variance": optional(check_amount),
    "squared_gradient": optional(check_finite),
    "step_speedup": optional(check_amount),
    "net_speedup": optional(check_amount),
}
_CHECKS: dict[str, tuple[Check, Any]] = {
    "probes": (partial(check_list, partial(check_record, _PROBE, _PROBE)), []),
    "c": (partial(_check_series, check_number), []),
    "losses": (partial(_check_series, optional(check_real)), []),
    "entries": (check_amount, 0.0),
    "rows": (check_amount, 0.0),
    "dense": (check_amount, 0.0),
    "seconds": (check_amount, 0.0),
    "probe_seconds": (check_amount, 0.0),
    "compile_seconds": (optional(check_amount), 0.0),
}


def plot(account: Account) -> Figure:
    """Loss, c, variance and speed-up against the step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("SUSBackprop.plot() needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    (loss, c), (variance, speed) = figure.subplots(2, 2, sharex=True)
    last = max([0, *(step for step, _ in (*account.losses, *account.c)), *(int(p["step"]) for p in account.probes)])
    loss.plot(*_axes(account.losses))
    finite = [(step, value if math.isfinite(value) else math.nan) for step, value in account.c]
    if finite:
        c.step(*_axes([*finite, (last, finite[-1][1])]), where="post", marker="." if len(finite) < 50 else None)
        c.set_yscale("log", base=2)
    for step, end in _infinite(account.c, last):
        c.axvspan(step, end, color="0.9", label="exact (c = inf)")
    for name, label in (("relative_variance", "all parameters"), ("worst_relative_variance", "worst attention kind")):
        steps, values = _axes(account.series(name))
        variance.plot(steps, [100 * v for v in values], marker=".", label=label)
    for name, label in (("step_speedup", "of a step"), ("net_speedup", "net of the variance")):
        speed.plot(*_axes(account.series(name)), marker=".", label=label)
    speed.axhline(1, color="0.5", linewidth=0.8)
    loss.set(title="Training loss")
    c.set(title="c (kept entries per row)")
    variance.set(title="Variance added by SUS, % of the batch's own", xlabel="step", ylim=(0, None))
    speed.set(title="Speed-up over the exact backward", xlabel="step", ylim=(0, None))
    for axes in (variance, speed):
        axes.legend()
    return figure


def _infinite(c: Sequence[tuple[int, float]], last: int) -> list[tuple[int, int]]:
    ends = [*(step for step, _ in c[1:]), last]
    return [(step, end) for (step, value), end in zip(c, ends, strict=False) if math.isinf(value)]


def _axes(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _thin(points: list[Any]) -> None:
    """Drops every other point of a series that has become long; the last one stays."""
    if len(points) > _POINTS:
        del points[-2::-2]


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(y for _, y in points) / len(points) if points else math.nan


def _median(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return median(finite) if finite else math.nan


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95% confidence interval of the median of measured ratios of times; NaN where there are none.

    From the scatter of their logarithms, with a prior as if two more had scattered by 10%: single ones are not sure.
    Ratios that are all 1 are of the exact backward with itself, and sure.

    Examples:
        >>> [round(x, 2) for x in interval([1.2])], [round(x, 2) for x in interval([1.3, 1.25, 1.35, 1.3, 1.3])]
        ([0.79, 1.82], [1.19, 1.42])
    """
    logs = [math.log(ratio) for ratio in ratios if ratio > 0]
    if not logs or all(ratio == 1 for ratio in ratios):
        return (1.0, 1.0) if logs else (math.nan, math.nan)
    count, middle = len(logs), median(logs)
    scatter = math.sqrt((sum((y - middle) ** 2 for y in logs) + 2 * 0.01) / (count + 1))
    degrees = count + 1
    quantile = 1.96 + 2.372 / degrees + 2.823 / degrees**2 + 2.556 / degrees**3  # of Student's distribution
    half = quantile * scatter * math.sqrt((1.0 if count < 3 else math.pi / 2) / count)
    return math.exp(middle - half), math.exp(middle + half)


def _path(c: Sequence[tuple[int, float]]) -> str:
    if not c:
        return "not measured"
    shown = c if len(c) <= 6 else [*c[:3], *c[-3:]]
    texts = [f"{value:g}" + (f" (step {step})" if step else "") for step, value in shown]
    if len(c) > 6:
        texts.insert(3, "...")
    return " -> ".join(texts)


def _said(value: float, template: str, missing: str = "not measured", formatted: Any = None) -> str:
    if math.isnan(value):
        return missing
    return template.format(value if formatted is None else formatted(value))


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
