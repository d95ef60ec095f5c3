"""Values for loggers, callbacks and the progress bar, under names that begin with ``sus/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from fx_passes.state import State
from sus_lightning._lightning_compat import logged_step


def log_now(trainer: pl.Trainer, values: Mapping[str, float]) -> None:
    """To the loggers, at this very step. ``self.log`` writes at ``log_every_n_steps``: a probe is seldom at one."""
    named = {f"sus/{name}": value for name, value in values.items()}
    for logger in trainer.loggers if named else ():
        logger.log_metrics(named, step=logged_step(trainer))


def publish(
    trainer: pl.Trainer, pl_module: pl.LightningModule, values: Mapping[str, float], shown: Sequence[str] = ()
) -> None:
    """To the loggers at this very step, and to `trainer.callback_metrics`; those in `shown` to the progress bar."""
    log_now(trainer, values)
    if trainer.barebones:
        return
    show(pl_module, values, shown)


def show(pl_module: pl.LightningModule, values: Mapping[str, float], shown: Sequence[str]) -> None:
    """To `trainer.callback_metrics`; those in `shown` to the progress bar."""
    for name, value in values.items():
        # No mean is taken; but where training_step takes an iterator, Lightning wants to be told the batch size.
        options: dict[str, Any] = {"logger": False, "on_step": True, "on_epoch": False}
        pl_module.log(f"sus/{name}", value, prog_bar=name in shown, batch_size=1, **options)


def pop_kept(trainer: pl.Trainer, state: State) -> tuple[float, float, float]:
    """Kept entries, rows, and the entries of a dense backward since the last call, over all ranks."""
    kept = state.pop_kept()
    counts = torch.tensor([kept.entries, kept.rows, kept.dense], device=trainer.strategy.root_device)
    entries, rows, dense = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return entries, rows, dense
