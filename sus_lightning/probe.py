"""The probe: measures gradient variance on training batches without any effect on training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Reversible, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from fx_passes import SUSBackend
from sus_lightning.gradients import Gradients, StepGradient, muted
from sus_lightning.metrics import GradientVariance
from sus_lightning.parameter_kinds import clean_name
from sus_lightning.snapshot import Snapshot
from sus_lightning.strategies import copies, is_sharded, local
from sus_lightning.variance_target import ALONE

# Draws of a probe come from a part of the counter's range that training never reaches: had they been those of the
# training step that follows, a c adapted from them would depend on that step's own noise.
_APART = 1 << 40


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
    ) -> dict[str, float]:
        """The values of `GradientVariance`, reduced over ranks. All ranks must call it at the same step.

        Args:
            batch: of the training step to come, on the device.
            batch_idx: index of `batch`.
            earlier: the batches before it with their indices, at least one.
            alone: by name, numbers of sites; the variance that their draws add while all other sites are exact is
                measured by one more gradient for each name, and is returned as ``sus_variance_alone/<name>``.
        """
        single = {name: GradientVariance().to(self.device) for name in alone or {}}
        for metric in (self.metric, *single.values()):
            metric.reset()
            # Read here, since GradientAccumulationScheduler changes it. Under manual optimization it is 1.
            ranks = 1 if self._sharded else self.trainer.world_size
            metric.batches_per_step = ranks * self.trainer.accumulate_grad_batches
        snapshot = Snapshot(self.root, self.backend.state)
        this, others = self._arguments(batch, batch_idx), [self._arguments(*other) for other in reversed(earlier)]
        try:
            with muted(self.trainer, self.root):
                self._measure(snapshot, this, others, [(single[name], sites) for name, sites in (alone or {}).items()])
        finally:
            snapshot.restore()
        values = {name: float(value) for name, value in self.metric.compute().items()}
        return values | {ALONE + name: float(metric.compute()["sus_variance"]) for name, metric in single.items()}

    def _measure(
        self,
        snapshot: Snapshot,
        this: Mapping[str, Any],
        others: Sequence[Mapping[str, Any]],
        alone: Sequence[tuple[GradientVariance, Sequence[int]]],
    ) -> None:
        state = self.backend.state
        counter = state.counter + _APART
        c_of = {site: state.c_of(site) for _, sites in alone for site in sites}
        state.c = math.inf
        exact = self._gradient(copied(this))
        if exact is None or not _finite(exact):
            return
        draws = [(self.metric, None)] * self.draws + list(alone)
        for draw, (metric, sites) in enumerate(draws):
            snapshot.restore()  # the same dropout masks, and the same module and c as before the exact gradient
            state.counter = counter + (draw << 20)
            if sites is not None:
                state.c = math.inf
                state.set_site_c({site: c_of[site] for site in sites})
            self._update(metric, exact, sus=self._gradient(copied(this)))
        for other in others:
            # Other dropout masks than before: they are part of the batch gradient's variance.
            snapshot.restore(random=False)
            state.c = math.inf
            gradient = self._gradient(copied(other))
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

    def _arguments(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        takes_index = is_param_in_hook_signature(self.root.training_step, "batch_idx", min_args=2)
        return {"batch": batch, **({"batch_idx": batch_idx} if takes_index else {})}


def copied(batch: Any) -> Any:
    """A batch with tensors and containers of its own: a training step may write into it, or take things out."""
    return apply_to_collection(batch, Tensor, torch.clone)


def _local(gradients: Gradients) -> Gradients:
    return [None if g is None else local(g) for g in gradients]


def _finite(gradients: Gradients) -> bool:
    sums = [local(g).sum(dtype=torch.float64) for g in gradients if g is not None]
    return bool(torch.stack(sums).isfinite().all()) if sums else False
