"""The callback is pickled and copied by many libraries: with hyperparameters, with a saved model, into a worker."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import Plain, equal, loader, trainer, weights

from fx_passes import SUSBackend
from sus_lightning import LinearSchedule, SUSBackprop, VarianceTarget


def sus(c: Any = 4, **options: Any) -> SUSBackprop:
    return SUSBackprop(c, **{"compiler": "eager", "variance_every_n_steps": 2, "seed": 3, **options})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)


def pickled(callback: Any) -> Any:
    return pickle.loads(pickle.dumps(callback))


class WithCallbacks(Plain):
    def __init__(self, callbacks: list[Callback]) -> None:
        super().__init__()
        self.save_hyperparameters()


COPIES = {"pickle": pickled, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("fitted", [False, True])
def test_a_copy_trains_as_the_original_would(how: str, fitted: bool) -> None:
    original = sus(VarianceTarget(0.05, start=6, per="layer"), sampler="independent", forward="library")
    if fitted:
        trainer(callbacks=[original], max_steps=4).fit(Plain(), loader())
    twin = COPIES[how](original)
    assert type(twin) is SUSBackprop
    assert twin.c == original.c
    assert twin.state_dict() == original.state_dict()
    assert (twin.backend.sampler, twin.backend.forward, twin.backend.state.seed) == ("independent", "library", 3)

    def more(callback: SUSBackprop) -> dict[str, torch.Tensor]:
        torch._dynamo.reset()
        seed_everything(1, verbose=False)
        module = Plain()
        trainer(callbacks=[callback], max_steps=4).fit(module, loader())
        assert callback.backend.report.rewritten == 2
        return weights(module)

    assert equal(more(twin), more(original))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_is_independent(how: str) -> None:
    original = sus()
    trainer(callbacks=[original], max_steps=2).fit(Plain(), loader())
    counter, text = original.backend.state.counter, str(original.backend.report)
    twin = COPIES[how](original)
    assert twin.backend is not original.backend
    assert twin.backend.state.id != original.backend.state.id
    twin.backend.c = 9
    trainer(callbacks=[twin], max_steps=2).fit(Plain(), loader())
    assert original.c == 4
    assert original.backend.state.counter == counter
    assert str(original.backend.report) == text


def test_no_copy_holds_the_module() -> None:
    # Lightning gives callbacks the module's `log`.
    callback, module = sus(), Plain()
    trainer(callbacks=[callback], max_steps=1).fit(module, loader())
    assert callback.log.__self__ is module
    assert b"Plain" not in pickle.dumps(callback)
    assert not {"log", "log_dict"} & vars(copy.deepcopy(callback)).keys()


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_during_a_fit(how: str, tmp_path: Path) -> None:
    """As neuralforecast, whose modules have the callbacks among their hyperparameters, which checkpoints contain."""

    class Copies(Callback):
        def on_train_batch_end(self, fit: Any, pl_module: Any, *_: Any) -> None:
            made.append(COPIES[how](callback))

    made: list[SUSBackprop] = []
    callback = sus()
    module = WithCallbacks([callback])
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    trainer(callbacks=[callback, Copies(), checkpoint], max_steps=4, enable_checkpointing=True).fit(module, loader())
    assert len(made) == 4
    assert callback.backend.report.rewritten == 2
    saved = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=False)
    [loaded] = saved["hyper_parameters"]["callbacks"]
    assert loaded.c == 4
    trainer(callbacks=[made[-1]], max_steps=2).fit(Plain(), loader())
    assert made[-1].backend.report.rewritten == 2


def test_the_same_callback_after_its_module_is_gone() -> None:
    callback = sus(variance_every_n_steps=0)
    for _ in range(2):  # the report of the first module must not hide what is found in the second
        trainer(callbacks=[callback], max_steps=1).fit(Plain(), loader())
    without = Plain(torch.nn.Sequential(torch.nn.Embedding(32, 8), torch.nn.Sequential(torch.nn.Linear(8, 32))))
    with pytest.raises(MisconfigurationException, match="rewrote no attention"):
        trainer(callbacks=[callback], max_steps=1).fit(without, loader())


def test_an_unpickled_backend_reports_on_its_own_calls() -> None:
    backend = SUSBackend(c=2, compiler="eager", sampler="independent")
    f = torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend=backend)
    f(torch.randn(1, 2, 8, 4, requires_grad=True)).sum().backward()
    twin = pickled(backend)
    assert twin.report.slow is twin.state.slow is not backend.state.slow
    assert (twin.c, twin.sampler, twin.state.counter) == (2, "independent", backend.state.counter)
    assert twin.report.rewritten == 1
    torch.compile(lambda q: (q @ q.mT).softmax(-1) @ q, backend=twin)(torch.randn(1, 2, 8, 4, requires_grad=True))
    assert twin.state.counter == backend.state.counter + 1


WORKER = """
import sys, pickle, torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import Plain, loader, trainer
with open(sys.argv[1], "rb") as file:
    callback = pickle.load(file)
trainer(callbacks=[callback], max_steps=3).fit(Plain(), loader())
assert callback.backend.report.rewritten == 2, callback.backend.report
kept = callback.backend.state.kept
print("c", callback.c, "counter", callback.backend.state.counter)
"""


@pytest.mark.parametrize("library", ["pickle", "cloudpickle"])
def test_a_worker_process_trains_with_it(library: str, tmp_path: Path) -> None:
    """cloudpickle, as ray and joblib have it, also takes a lambda."""
    package = pytest.importorskip(library)
    callback = sus(LinearSchedule(8, 4, steps=2) if library == "pickle" else (lambda step: 8.0 - 2 * step))
    trainer(callbacks=[callback], max_steps=2).fit(Plain(), loader())
    file = tmp_path / "callback.pkl"
    file.write_bytes(package.dumps(callback))
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WORKER, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"c 4.0 counter {callback.backend.state.counter + 3}" in done.stdout


def test_spawned_ranks() -> None:
    callback = sus(variance_every_n_steps=0)
    fit = trainer(callbacks=[callback], max_steps=2, strategy="ddp_spawn", devices=2)
    fit.fit(Plain(), loader())
    assert 0 < fit.callback_metrics["sus/kept_per_row"] <= 4
    assert fit.callback_metrics["sus/attention_rewritten"] == 2
