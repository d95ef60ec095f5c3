"""Trains with SUS and goes on from the newest checkpoint that is whole; killed and started again until it ends.

Reads lines from stdin: folder, where to be killed ("-": not at all), and at which time it comes there, with tabs
between. Each is a life of its own: a process forked off before anything but imports was done, as these take most of the
time. It prints how a life ended: 0, or the number of the signal below 0. A life that ends writes `end.pt`.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from models import Plain, loader, trainer

from sus_lightning import SUSBackprop, VarianceTarget
from sus_lightning.probe import Probe


class Kill:
    """Kills this process a moment after it has come to a place for the `count`-th time."""

    where, count = "-", 0

    @classmethod
    def soon(cls, where: str, seconds: float) -> None:
        if where != cls.where:
            return
        cls.count -= 1
        if cls.count == 0:
            moment = random.uniform(0, seconds)
            threading.Thread(
                target=lambda: (time.sleep(moment), os.kill(os.getpid(), signal.SIGKILL)), daemon=True
            ).start()


class SlowIO(TorchCheckpointIO):
    """Writes in two halves, so that a kill can come between them."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        Kill.soon("checkpoint", 0.05)
        whole = Path(str(path) + ".tmp")
        torch.save(checkpoint, whole)
        data = whole.read_bytes()
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(0.03 if Kill.where == "checkpoint" else 0)
            file.write(data[len(data) // 2 :])
        whole.unlink()


class Killed(SUSBackprop):
    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        Kill.soon("step", 0.02)
        super().on_train_batch_start(*args, **kwargs)


measure = Probe._measure


def _measure(self: Probe, *args: Any, **kwargs: Any) -> None:
    Kill.soon("probe", 0.05)
    measure(self, *args, **kwargs)


Probe._measure = _measure  # type: ignore[method-assign]


def newest(folder: Path) -> str | None:
    for path in sorted(folder.glob("*.ckpt"), key=lambda p: -p.stat().st_mtime_ns):
        try:
            torch.load(path, weights_only=False)
        except Exception:
            path.unlink()  # half written
        else:
            return str(path)
    return None


def live(folder: Path) -> None:
    random.seed(os.getpid())
    seed_everything(5, verbose=False)
    module, target = Plain(), VarianceTarget(0.05, start=6)
    callback = Killed(c=target, compiler="eager", variance_every_n_steps=3)
    checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit = trainer(
        callbacks=[callback, checkpoints], max_steps=-1, max_epochs=8, enable_checkpointing=True, plugins=[SlowIO()]
    )
    Kill.soon("start", 1.0)
    if resume := newest(folder):
        fit.fit(module, loader(16), ckpt_path=resume, weights_only=False)
    else:
        fit.fit(module, loader(16))
    state = {k: v for k, v in callback.state_dict().items() if k != "number"}
    torch.save({"weights": module.state_dict(), "callback": state}, folder / "end.pt")


def main() -> None:
    for line in sys.stdin:
        folder, Kill.where, count = line.rstrip("\n").split("\t")
        Kill.count = int(count)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(2, 1)  # what a fit prints is no answer
                live(Path(folder))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
