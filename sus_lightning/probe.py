"""The probe: measures gradient variance on training batches without any effect on training."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Reversible, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from fx_passes import SUSBackend
from fx_passes.expect import Expectation, expect
from fx_passes.state import Kept
from sus_lightning.adaptive import ALONE, AT
from sus_lightning.earlier_batches import copied
from sus_lightning.gradients import Gradients, StepGradient, muted
from sus_lightning.metrics import GradientVariance
from sus_lightning.parameter_kinds import clean_name
from sus_lightning.snapshot import Snapshot
from sus_lightning.strategies import copies, is_sharded, local
from sus_lightning.timing import Clock, PassTimes, shapes

# Draws of a probe come from a part of the counter's range that training never reaches: had they been those of the
# training step that follows, a c adapted from them would depend on that step's own noise.
_APART = 1 << 40

# Values of a probe that are not logged by themselves.
_INTERNAL = {
    "squared_gradient",
    "step_seconds",
    "step_samples",
    "exact_step_seconds",
    "exact_step_samples",
    "probe_seconds",
    "kept_per_row",  # logged from the training steps
    "kept_fraction",
}


@dataclass
class _Draw:
    """SUS gradients at one setting of c: where their variance is added, and the entries that they kept."""

    name: str  # of the values
    metric: GradientVariance
    c: float
    site_c: Mapping[int, float]
    kept: Kept

    @property
    def timed_as(self) -> str:
        """Its name, or "exact" where it is the exact backward once more."""
        return "exact" if math.isinf(self.c) and not self.site_c else self.name


class Probe:
    """Measures the variance that SUS adds to the gradient of ``training_step``.

    On the training batch it takes the exact gradient (c = infinity) and `draws` SUS gradients with the same dropout
    masks, and on each of some earlier batches another exact gradient. Pairs of batches give the batch gradient's own
    variance with the shapes that training uses, so nothing is compiled anew: a graph of half the batch would be, and
    the next training step might then run in that graph, with other rounding.

    Args:
        trainer: in fit, with optimizers.
        root: its LightningModule.
        backend: whose c and random state is used.
        draws: SUS gradients per probe, at least 1.
        per: of `GradientVariance`.
    """

    def __init__(
        self, trainer: pl.Trainer, root: pl.LightningModule, backend: SUSBackend, draws: int, per: str = "kind"
    ) -> None:
        named = [(clean_name(name), p) for name, p in root.named_parameters() if p.requires_grad]
        self.trainer, self.root, self.backend, self.draws = trainer, root, backend, draws
        self.parameters = [p for _, p in named]
        self._gradient = StepGradient(trainer, root, self.parameters)
        self._sharded = is_sharded(trainer)
        self.metric = GradientVariance(((name, local(p).shape) for name, p in named), per=per)
        self.device = root.device if root.device.type != "mps" else torch.device("cpu")  # mps has no float64
        self.metric.to(self.device)

    def __call__(
        self,
        batch: Any,
        batch_idx: int,
        earlier: Reversible[tuple[Any, int]],
        alone: Mapping[str, Sequence[int]] | None = None,
        at: Mapping[float, Mapping[int, float]] | None = None,
        training: Sequence[float] = (),
    ) -> dict[str, float]:
        """The values of `GradientVariance`, and times of a step, over all ranks. All must call it at the same step.

        ``step_seconds`` and ``exact_step_seconds`` are medians of a forward and backward at c and with the exact
        backward, on the slowest rank; ``step_samples`` and ``exact_step_samples`` of how many. ``kept_per_row`` and
        ``kept_fraction`` are those of the probe's own SUS passes. ``probe_seconds`` is the time of all of it.

        Args:
            batch: of the training step to come, on the device.
            batch_idx: index of `batch`.
            earlier: the batches before it with their indices, at least one.
            alone: by name, numbers of sites; the variance that their draws add while all other sites are exact is
                measured by one more gradient for each name, and is returned as ``sus_variance_alone/<name>``.
            at: other c to measure at by one more gradient each, with the c of sites that have their own; returned as
                ``at/<c>/sus_variance``, ``at/<c>/step_seconds`` and so on.
            training: seconds of forward and backward of training steps at the c in use, for ``step_seconds``.
        """
        start, state = time.perf_counter(), self.backend.state
        draws = [_Draw("", self.metric, state.c, state.site_c, Kept())]
        draws += [_Draw(f"{AT}{c!r}/", deepcopy(self.metric), c, site_c, Kept()) for c, site_c in (at or {}).items()]
        single = [
            _Draw(name, GradientVariance().to(self.device), math.inf, {s: state.c_of(s) for s in sites}, Kept())
            for name, sites in (alone or {}).items()
        ]
        for draw in (*draws, *single):
            draw.metric.reset()
            # Read here, since GradientAccumulationScheduler changes it. Under manual optimization it is 1.
            ranks = 1 if self._sharded else self.trainer.world_size
            draw.metric.batches_per_step = ranks * self.trainer.accumulate_grad_batches
        snapshot, times = Snapshot(self.root, state), PassTimes(Clock(self.root.device))
        this, others = self._arguments(batch, batch_idx), [self._arguments(*other) for other in reversed(earlier)]
        try:
            with muted(self.trainer, self.root):
                self._measure(snapshot, this, others, draws, single, times)
        finally:
            snapshot.restore()
        for draw in draws[1:]:  # the batch's variance is the same, whatever c
            draw.metric.spread, draw.metric.product = self.metric.spread, self.metric.product
            draw.metric.pairs = self.metric.pairs
        values = {draw.name + name: float(v) for draw in draws for name, v in draw.metric.compute().items()}
        values |= {ALONE + draw.name: float(draw.metric.compute()["sus_variance"]) for draw in single}
        return values | self._times(draws, times, training, start)

    def _times(
        self, draws: Sequence[_Draw], times: PassTimes, training: Sequence[float], start: float
    ) -> dict[str, float]:
        """Times and kept entries over all ranks."""
        values: dict[str, float] = {}
        values["exact_step_seconds"], values["exact_step_samples"] = times.median("exact")
        for draw in draws:
            # At c = inf not: the SUS passes would be compared with steps, which do a little more than a pass.
            more = training if draw is draws[0] and draw.timed_as != "exact" else ()
            seconds, samples = times.median(draw.timed_as, more)
            values |= {f"{draw.name}step_seconds": seconds, f"{draw.name}step_samples": samples}
        values["probe_seconds"] = time.perf_counter() - start
        reduce, device = self.trainer.strategy.reduce, self.trainer.strategy.root_device
        slowest = reduce(torch.tensor(list(values.values()), device=device), reduce_op="max")
        values = dict(zip(values, slowest.tolist(), strict=True))
        counts = torch.tensor([[d.kept.entries, d.kept.rows, d.kept.dense] for d in draws], device=device)
        for draw, (entries, rows, dense) in zip(draws, reduce(counts, reduce_op="sum").tolist(), strict=True):
            if rows:
                values |= {f"{draw.name}kept_per_row": entries / rows, f"{draw.name}kept_fraction": entries / dense}
        return values

    def _measure(
        self,
        snapshot: Snapshot,
        this: Mapping[str, Any],
        others: Sequence[Mapping[str, Any]],
        draws: Sequence[_Draw],
        single: Sequence[_Draw],
        times: PassTimes,
    ) -> None:
        state = self.backend.state
        counter = state.counter + _APART
        state.c = math.inf
        arguments = copied(this)
        with times("exact"):
            exact = self._gradient(arguments)
        if exact is None or not _finite(exact):
            return
        for i, draw in enumerate([draws[0]] * self.draws + [*draws[1:], *single]):
            snapshot.restore()  # the same dropout masks, and the same module as before the exact gradient
            state.counter = counter + (i << 20)
            state.c, state.kept = draw.c, Kept()
            state.set_site_c(draw.site_c)
            arguments = copied(this)
            with times(draw.timed_as):
                gradient = self._gradient(arguments)
            self._update(draw.metric, exact, sus=gradient)
            kept = state.pop_kept()
            draw.kept = Kept(draw.kept.entries + kept.entries, draw.kept.rows + kept.rows, draw.kept.dense + kept.dense)
        for other in others:
            # Other dropout masks than before: they are part of the batch gradient's variance.
            snapshot.restore(random=False)
            state.c = math.inf
            arguments = copied(other)
            # A batch of another length takes another time.
            with times("exact" if shapes(other) == shapes(this) else "other"):
                gradient = self._gradient(arguments)
            if gradient is not None and self._update(self.metric, exact, other=gradient):
                exact = gradient  # pairs of neighbours: two gradients in memory, however many batches there are

    def _update(
        self, metric: GradientVariance, exact: Gradients, sus: Gradients | None = None, other: Gradients | None = None
    ) -> bool:
        """Whether there was something to add: a step may be skipped, and float16 gradients may overflow."""
        gradients = sus if sus is not None else other
        if gradients is None or not _finite(gradients):
            return False
        weights = None
        if self._sharded:
            weights = [1.0 if g is None else 1.0 / copies(g) for g in exact]
        metric.update(
            _local(exact),
            sus=None if sus is None else _local(sus),
            other=None if other is None else _local(other),
            weights=weights,
            counts=not self._sharded or self.trainer.is_global_zero,
        )
        return True

    def expectation(self, batch: Any, batch_idx: int) -> Expectation | None:
        """Attention's share of a step, from one more forward of ``training_step``, uncompiled by the caller."""
        if not self.root.automatic_optimization:
            return None  # the training step steps optimizers
        snapshot = Snapshot(self.root, self.backend.state)
        try:
            with muted(self.trainer, self.root), self.trainer.precision_plugin.train_step_context():
                arguments = tuple(copied(self._arguments(batch, batch_idx)).values())
                return expect(self.root.training_step, arguments, {})
        finally:
            snapshot.restore()

    def _arguments(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        takes_index = is_param_in_hook_signature(self.root.training_step, "batch_idx", min_args=2)
        return {"batch": batch, **({"batch_idx": batch_idx} if takes_index else {})}


def to_be_logged(values: Mapping[str, float]) -> dict[str, float]:
    """Of the values of a probe, those that loggers get."""
    return {k: v for k, v in values.items() if k not in _INTERNAL and not k.startswith((ALONE, AT))}


def _local(gradients: Gradients) -> Gradients:
    return [None if g is None else local(g) for g in gradients]


def _finite(gradients: Gradients) -> bool:
    sums = [local(g).sum(dtype=torch.float64) for g in gradients if g is not None]
    return bool(torch.stack(sums).isfinite().all()) if sums else False


def takes_batches(root: pl.LightningModule) -> bool:
    """Whether a probe can call `training_step`, which may take the iterator of batches instead of a batch."""
    return not is_param_in_hook_signature(root.training_step, "dataloader_iter", explicit=True)
