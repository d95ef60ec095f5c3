"""When probes are due: every so many optimizer steps, and so seldom that they keep to their share of the time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

INTERVAL = 200  # optimizer steps between two probes, at least, where the user did not say
_BUDGET = 0.03  # of training time in probes


class Pacing:
    """Steps at which probes were and may be.

    Args:
        budgeted: whether probes keep below 3% of the training time.

    Attributes:
        probed_step: that of the last probe.
        not_before: the first step at which the next one may be.
    """

    def __init__(self, budgeted: bool, probed_step: int = 0, not_before: int = 0) -> None:
        self.budgeted, self.probed_step, self.not_before = budgeted, probed_step, not_before
        self._since: tuple[int, float] | None = None  # step and moment from which the loop ran without a probe

    def check_resumed(self, step: int, owner: str) -> None:
        """Raises ValueError if the last probe of a checkpoint lies after the step at which training goes on."""
        if self.probed_step > step:
            raise ValueError(
                f"the saved state of {owner}: probed_step must be at most the global step {step} at which training "
                f"goes on, but it is {self.probed_step}"
            )

    def is_due(self, step: int, every: int) -> bool:
        """Whether a probe belongs to this step, or to an earlier one at which it was not possible."""
        return step >= max(1, self.not_before) and (step - 1) // every > (self.probed_step - 1) // every

    def step_seconds(self, step: int) -> float:
        """Seconds of an optimizer step since the last probe, of everything; NaN where none was."""
        if self._since is None or step <= self._since[0]:
            return math.nan
        return (time.perf_counter() - self._since[1]) / (step - self._since[0])

    def probed(self, trainer: pl.Trainer, step: int, values: Mapping[str, float], step_seconds: float) -> None:
        """Notes a probe, and keeps the next one as far away as the budget asks for. All ranks call it.

        Args:
            trainer: whose ranks have to agree.
            step: optimizer steps so far.
            values: what the probe returned.
            step_seconds: what `step_seconds` had returned before the probe.
        """
        if self.budgeted:
            # Before the first probe steps were compiled: a forward and backward is the least that one takes.
            known = step_seconds
            if math.isnan(known):
                known = values["step_seconds"] * trainer.accumulate_grad_batches
            slowest = torch.tensor(-known, device=trainer.strategy.root_device)
            seconds = -float(trainer.strategy.reduce(slowest, reduce_op="max"))  # the same on all ranks
            wait = values["probe_seconds"] / (_BUDGET * seconds) if seconds > 0 else 0.0
            self.not_before = step + math.ceil(wait)
        self.probed_step = step
        self._since = step, time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_since": None}  # a moment of this process
