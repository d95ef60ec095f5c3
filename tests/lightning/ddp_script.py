"""Two processes on gloo, started by test_strategies.py: trains, and writes what each rank saw to a file.

Usage: ddp_script.py FOLDER STRATEGY PROBE_INTERVAL adapt|auto|constant
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from models import LM, Plain, loader, trainer
from torch import nn

from sus_lightning import AutoC, SUSBackprop, VarianceTarget


class Sharded(Plain):
    """FSDP2: blocks, then the root, as torch's tutorial has it."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if not isinstance(self.model, nn.Identity):
            return
        from torch.distributed.fsdp import fully_shard

        self.model = LM()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


def make(name: str) -> tuple[Plain, Strategy]:
    if name == "model_parallel":
        return Sharded(), ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
        )
    options: dict[str, Any] = {
        "ddp": {},
        "ddp_find_unused": {"find_unused_parameters": True},
        "ddp_bucket_view": {"gradient_as_bucket_view": True},
        "ddp_static": {"static_graph": True},
    }[name]
    return Plain(), DDPStrategy(process_group_backend="gloo", **options)


def main(folder: str, name: str, every: int, mode: str) -> None:
    torch.set_num_threads(1)
    seed_everything(2, verbose=False)
    module, strategy = make(name)
    schedules: dict[str, Any] = {
        "adapt": VarianceTarget(0.05, start=6, minimum=1, per="layer"),
        "auto": AutoC(start=6, minimum=1, per="layer"),
        "constant": 6,
    }
    schedule = schedules[mode]
    callback = SUSBackprop(schedule, compiler="aot_eager", variance_every_n_steps=every)
    draws: list[int] = []
    next_seed = callback.backend.state.next_seed
    callback.backend.state.next_seed = lambda: draws.append(next_seed()) or draws[-1]  # type: ignore[func-returns-value]
    fit = trainer(callbacks=[callback], devices=2, strategy=strategy, max_steps=6)
    fit.fit(module, loader(64))
    full = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in module.named_parameters()}
    seen = {
        "c": callback.c,
        "site_c": list(callback.backend.state.site_c.values()),
        "counter": callback.backend.state.counter,
        "draws": draws,
        "rewritten": callback.backend.report.rewritten,
        "variance": callback._variance,
        "schedule": schedule.state_dict() if mode != "constant" else {},
        "summary": callback.summary.numbers(),
        "weights": {n: p.detach().double().flatten().tolist() for n, p in full.items()},
        "rank": fit.global_rank,
    }
    (Path(folder) / f"{fit.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
