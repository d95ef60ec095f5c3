"""SUSBackprop and its schedules in LightningCLI's YAML."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from models import Plain, loader

from sus_lightning import LinearSchedule, StepSchedule, SUSBackprop, VarianceTarget

# What jsonargparse[signatures], of the extra "test", brings and jsonargparse alone does not.
pytest.importorskip("typeshed_client")
pytest.importorskip("docstring_parser")


class ForCLI(Plain):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)

    def train_dataloader(self) -> Any:
        return loader()


YAML = """
trainer:
  accelerator: cpu
  devices: 1
  max_steps: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: sus_lightning.SUSBackprop
      init_args:
        compiler: eager
        variance_every_n_steps: 2
        c: {c}
"""
SCHEDULES: dict[str, tuple[str, Any]] = {
    "number": ("12.5", 12.5),
    "linear": (
        "{class_path: sus_lightning.LinearSchedule, init_args: {start: 40, end: 4, steps: 2}}",
        LinearSchedule,
    ),
    "target": ("{class_path: sus_lightning.VarianceTarget, init_args: {target: 0.02, per: layer}}", VarianceTarget),
    "step": (
        "{class_path: sus_lightning.StepSchedule, init_args: {milestones: {0: .inf, 2: 4}}}",
        StepSchedule,
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_yaml(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    c, expected = SCHEDULES[case]
    (tmp_path / "config.yaml").write_text(YAML.replace("{c}", c))
    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.chdir(tmp_path)
    cli = LightningCLI(
        ForCLI,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
        save_config_callback=None,
        seed_everything_default=0,
    )
    (callback,) = [x for x in cli.trainer.callbacks if isinstance(x, SUSBackprop)]
    if isinstance(expected, float):
        assert callback.c == expected
    else:
        assert isinstance(callback.schedule, expected)
    assert callback.backend.report.rewritten == 2
