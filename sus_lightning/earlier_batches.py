"""The batches before a probe, with which it compares its own: their spread is the variance of the batch gradient."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, clone

from sus_lightning._lightning_compat import accumulates


class EarlierBatches:
    """Copies of the other micro-batches of a probe's step, or of the batch before it, with their indices."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Any, int]] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return iter(self._kept)

    def __reversed__(self) -> Iterator[tuple[Any, int]]:
        return reversed(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def new_epoch(self, trainer: pl.Trainer) -> None:
        # The last batch of an epoch may be a small one. Decided by what is the same on all ranks.
        if trainer.num_training_batches > 2:
            self.clear()

    def keep(self, trainer: pl.Trainer, batch: Any, batch_idx: int, needed: bool) -> None:
        """Takes a batch in, or forgets all where no probe is near."""
        if not needed:
            self.clear()
            return
        while len(self._kept) >= max(1, trainer.accumulate_grad_batches - 1):
            self._kept.popleft()
        self._kept.append((copied(batch), batch_idx))


def may_probe(trainer: pl.Trainer) -> bool:
    """Whether this batch completes an optimizer step and has the size of the others."""
    odd = trainer.is_last_batch and trainer.num_training_batches > 2
    return not odd and not accumulates(trainer)


def copied(batch: Any) -> Any:
    """A batch with tensors and containers of its own: a training step may write into it, or take things out."""
    return apply_to_collection(batch, Tensor, clone)
