"""What differs from strategy to strategy."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import Tensor

from sus_lightning._lightning_compat import MisconfigurationException, is_strategy


def check_strategy(trainer: pl.Trainer) -> None:
    """Refuses strategies under which the callback cannot work.

    Raises:
        MisconfigurationException: for DeepSpeed.
    """
    if is_strategy(trainer.strategy, "DeepSpeedStrategy"):
        raise MisconfigurationException(
            "SUSBackprop does not support the strategy DeepSpeedStrategy: DeepSpeed's engine owns the backward and the "
            "gradients, and it was never tested with it. Use 'ddp' or ModelParallelStrategy."
        )


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether a rank holds parts of one gradient that is averaged over ranks, rather than a gradient of its own."""
    return is_strategy(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy")


def local(gradient: Tensor) -> Tensor:
    """This rank's part of a gradient that may be a DTensor."""
    to_local = getattr(gradient, "to_local", None)
    return to_local() if to_local is not None else gradient


def copies(gradient: Tensor) -> int:
    """How many ranks hold the same part of a gradient."""
    count = 1
    mesh = getattr(gradient, "device_mesh", None)
    if mesh is not None:
        for dim, placement in enumerate(gradient.placements):  # type: ignore[attr-defined]
            if placement.is_replicate():
                count *= mesh.size(dim)
    return count
