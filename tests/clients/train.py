"""Trains the models of libraries that build on Lightning, without and with SUSBackprop, on generated data.

For each model with attention:

- how many attentions run in a training step of eager code (`count.py`), and how many of them the callback rewrote;
- the training losses at c = inf against those without the callback;
- that it trains at c = 8 with another gradient;
- save, load and predict after the fit, with the fitted callback inside the saved object where the library keeps it.

Usage: python -m tests.clients.train [--share i/n] [NAME ...] [--json FILE]. Run in an environment of .ci/clients.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from sus_lightning import SUSBackprop
from sus_lightning._lightning_compat import AnyCallback
from tests.clients.count import CountAttention

# After fit: saves, loads, predicts; raises if something is wrong.
AfterFit = Callable[[Path], None]
# Trains a few steps with the callbacks.
Client = Callable[[list[Any]], AfterFit]
STEPS = 4
LIBRARIES = ("gluonts_models", "neuralforecast_models", "darts_models", "forecasting_models", "litgpt_models")


class Watch(AnyCallback):
    """The losses of the training steps, and the attentions of the first one."""

    def __init__(self, count: bool = False) -> None:
        self.losses: list[float] = []
        self.attentions = 0
        self._mode = CountAttention() if count else None
        self._inside = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._mode is not None and not self.losses:
            self._mode.__enter__()
            self._inside = True

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._mode is not None and self._inside:
            self._mode.__exit__(None, None, None)
            self._inside = False
            self.attentions = self._mode.count
            self._mode = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._leave()
        self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))


class Keep(AnyCallback):
    """Finds the SUSBackprop that took part: some libraries copy the callbacks that they are given."""

    used: SUSBackprop | None = None
    watch: Watch | None = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        Keep.used = next((c for c in trainer.callbacks if isinstance(c, SUSBackprop)), None)
        Keep.watch = next(c for c in trainer.callbacks if isinstance(c, Watch))


def fit(client: Client, sus: SUSBackprop | None, count: bool = False) -> tuple[Watch, SUSBackprop | None, AfterFit]:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)
    Keep.used = Keep.watch = None
    after = client([*([] if sus is None else [sus]), Watch(count), Keep()])
    assert Keep.watch is not None
    assert Keep.watch.losses, "no training step ran"
    return Keep.watch, Keep.used, after


def sus(c: float) -> SUSBackprop:
    return SUSBackprop(c, compiler="eager", variance_every_n_steps=0)


def check(client: Client) -> dict[str, Any]:
    """What one model did."""
    began = time.time()
    plain, _, _ = fit(client, None, count=True)
    exact, callback, _ = fit(client, sus(float("inf")))
    assert callback is not None
    worst = max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(plain.losses, exact.losses, strict=True))
    report = callback.backend.report
    noisy, callback, after = fit(client, sus(8))
    result = {
        "attentions": plain.attentions,
        "rewritten": report.rewritten,
        "difference": worst,
        "moved": plain.losses[1:] != noisy.losses[1:],
        "report": str(report),
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            after(Path(folder))
            result["after"] = "ok"
        except Exception as error:
            result["after"] = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
    return {**result, "seconds": round(time.time() - began, 1)}


def clients() -> dict[str, Client]:
    found: dict[str, Client] = {}
    for library in LIBRARIES:
        found |= importlib.import_module(f"tests.clients.{library}").CLIENTS
    return found


def share_of(names: list[str], share: str) -> list[str]:
    """Every n-th name, from the i-th on."""
    i, n = map(int, share.split("/"))
    return names[i % n :: n]


def passed(result: dict[str, Any]) -> bool:
    found = result.get("attentions", 0)
    return bool(
        found and result["rewritten"] == found and result["difference"] < 1e-4 and result["moved"]
        and result["after"] == "ok"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    every = clients()
    names = options.names or share_of(list(every), options.share)
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = check(every[name])
        except Exception as error:
            traceback.print_exc()
            results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
        print(("ok    " if passed(results[name]) else "FAILED"), name, results[name], flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    sys.exit(not all(passed(result) for result in results.values()))


if __name__ == "__main__":
    main()
