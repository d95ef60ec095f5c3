"""Trains with SUS and goes on from the newest checkpoint that is whole; killed and started again until it ends.

Arguments: folder, where to be killed ("": not at all), and at which time it comes there. It writes `end.pt`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from models import Plain, loader, trainer

from sus_lightning import SUSBackprop, VarianceTarget
from sus_lightning.probe import Probe

FOLDER, WHERE, COUNT = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
_seen = 0


def kill_soon(where: str, seconds: float) -> None:
    """Kills this process a moment after it has come to a place for the COUNT-th time."""
    global _seen
    if where != WHERE:
        return
    _seen += 1
    if _seen == COUNT:
        threading.Thread(
            target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
        ).start()


class SlowIO(TorchCheckpointIO):
    """Writes in two halves, so that a kill can come between them."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        kill_soon("checkpoint", random.uniform(0, 0.05))
        whole = Path(str(path) + ".tmp")
        torch.save(checkpoint, whole)
        data = whole.read_bytes()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(0.03 if WHERE == "checkpoint" else 0)
            file.write(data[len(data) // 2 :])
        whole.unlink()


class Killed(SUSBackprop):
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        kill_soon("step", random.uniform(0, 0.02))
        super().on_train_batch_start(*args, **kwargs)


measure = Probe._measure


def _measure(self: Probe, *args: Any, **kwargs: Any) -> None:
    kill_soon("probe", random.uniform(0, 0.05))
    measure(self, *args, **kwargs)


Probe._measure = _measure  # type: ignore[method-assign]


def newest() -> str | None:
    for path in sorted(FOLDER.glob("*.ckpt"), key=lambda p: -p.stat().st_mtime_ns):
        try:
            torch.load(path, weights_only=False)
        except Exception:
            path.unlink()  # half written
        else:
            return str(path)
    return None


seed_everything(5, verbose=False)
module, target = Plain(), VarianceTarget(0.05, start=6)
callback = Killed(c=target, compiler="eager", variance_every_n_steps=3)
checkpoints = ModelCheckpoint(FOLDER, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
fit = trainer(
    callbacks=[callback, checkpoints], max_steps=-1, max_epochs=8, enable_checkpointing=True, plugins=[SlowIO()]
)
kill_soon("start", random.uniform(0, 3))
if resume := newest():
    fit.fit(module, loader(16), ckpt_path=resume, weights_only=False)
else:
    fit.fit(module, loader(16))
state = {k: v for k, v in callback.state_dict().items() if k != "number"}
torch.save({"weights": module.state_dict(), "callback": state}, FOLDER / "end.pt")
