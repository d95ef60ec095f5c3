"""Two processes on gloo, started by test_strategies.py: trains, and writes what each rank saw to a file.

Usage: ddp_script.py FOLDER STRATEGY PROBE_INTERVAL adapt|auto|constant|exact|none
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from models import LM, Attention, Plain, loader, trainer
from torch import Tensor, nn

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


class DTensorAttention(Attention):
    """Query, key and value stay DTensors up to attention, which is written out: DTensor has no fused one on CPUs."""

    def __init__(self, like: Attention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = like.q_proj, like.k_proj, like.v_proj, like.o_proj

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (p(x).view(b, n, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = (q @ k.transpose(-1, -2) / (d // self.heads) ** 0.5).softmax(-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(b, n, d))


class TensorParallel(Plain):
    """Attention sharded by heads over "tensor_parallel", and by FSDP2 over "data_parallel" where that has ranks."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def configure_model(self) -> None:
        if not isinstance(self.model, nn.Identity):
            return
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        torch.manual_seed(2)
        self.model = LM()
        rows, columns = RowwiseParallel(), ColwiseParallel(use_local_output=False)
        for layer in self.model.layers:
            layer.attention = DTensorAttention(layer.attention)
            plan = {"q_proj": columns, "k_proj": columns, "v_proj": columns, "o_proj": rows}
            parallelize_module(layer.attention, self.device_mesh["tensor_parallel"], plan)
        data = self.device_mesh["data_parallel"]
        if data.size() > 1:
            for layer in self.model.layers:
                fully_shard(layer, mesh=data)
            fully_shard(self.model, mesh=data)


def make(name: str) -> tuple[Plain, Strategy]:
    if name.startswith("tensor_parallel"):
        data = 2 if name == "tensor_parallel_fsdp" else 1
        return TensorParallel(), ModelParallelStrategy(
            data_parallel_size=data, tensor_parallel_size=2, process_group_backend="gloo"
        )
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
        "exact": float("inf"),
        "none": 6,
    }
    schedule = schedules[mode]
    callback = SUSBackprop(schedule, compiler="aot_eager", variance_every_n_steps=every)
    draws: list[int] = []
    next_seed = callback.backend.state.next_seed
    callback.backend.state.next_seed = lambda: draws.append(next_seed()) or draws[-1]  # type: ignore[func-returns-value]
    callbacks = [] if mode == "none" else [callback]
    ranks = 4 if name == "tensor_parallel_fsdp" else 2
    fit = trainer(callbacks=callbacks, devices=ranks, strategy=strategy, max_steps=6)
    fit.fit(module, loader(64))
    full = {n: getattr(p, "full_tensor", lambda p=p: p)() for n, p in module.named_parameters()}
    seen = {
        "c": callback.c,
        "site_c": list(callback.backend.state.site_c.values()),
        "counter": callback.backend.state.counter,
        "draws": draws,
        "rewritten": callback.backend.report.rewritten,
        "variance": callback._variance,
        "schedule": schedule.state_dict() if mode in ("adapt", "auto") else {},
        "summary": callback.summary.numbers() if callback.summary is not None else {},
        "weights": {n: p.detach().double().flatten().tolist() for n, p in full.items()},
        "rank": fit.global_rank,
    }
    (Path(folder) / f"{fit.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
