"""Two processes on gloo, started by test_sharding.py: attention between DTensors, against the same model on one rank.

Usage: shard_script.py FILE RANK PORT
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fx_passes import SUSBackend, sus_attention

B, N, WIDTH, HEADS = 2, 12, 16, 4
Attend = Callable[..., Tensor]
Placement = Shard | Replicate | None  # of the input; None is a plain tensor


def manual(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v


def masked(q: Tensor, k: Tensor, v: Tensor, *, tril: Tensor, **_: Any) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2).masked_fill(tril == 0, -torch.inf).softmax(-1) @ v


def biased(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor, **_: Any) -> Tensor:
    return (q @ k.transpose(-1, -2) / 2 + bias).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, *, padding: Tensor, tril: Tensor, **_: Any) -> Tensor:
    """Rows of the first sequence see no key: its first keys are padding."""
    scores = (q @ k.transpose(-1, -2) / 2).masked_fill((tril == 0) | (padding[:, None, None] == 0), -1e9)
    return scores.softmax(-1) @ v


def capped(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return (torch.exp(q @ k.transpose(-1, -2)).clamp(max=50.0)).softmax(-1) @ v  # known as logits only


def sdpa(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=False)


def grouped(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    b, h, n, d = q.shape
    k, v = (x[:, :, None].expand(b, h // 2, 2, n, d).reshape(b, h, n, d) for x in (k, v))
    return manual(q, k, v)


def checkpointed(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return checkpoint(manual, q, k, v, use_reentrant=False)


class Attention(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend
        keys = WIDTH // 2 if attend is grouped else WIDTH
        self.q_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k_proj, self.v_proj = nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        self.bias = nn.Parameter(torch.randn(1, HEADS, N, N))
        self.register_buffer("tril", torch.ones(N, N, dtype=torch.long).tril())
        padding = torch.ones(B, N, dtype=torch.long)
        padding[0, :4] = 0
        self.register_buffer("padding", padding)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (p(x).view(b, n, -1, WIDTH // HEADS).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = self.attend(q, k, v, bias=self.bias, tril=self.tril, padding=self.padding)
        return self.o_proj(y.transpose(1, 2).reshape(b, n, d))


def tensor_parallel(module: Attention, mesh: Any) -> None:
    plan: dict[str, Any] = {name: ColwiseParallel(use_local_output=False) for name in ("q_proj", "k_proj", "v_proj")}
    parallelize_module(module, mesh, {**plan, "o_proj": RowwiseParallel(use_local_output=False)})
    distribute_module(module, mesh)  # what is left, masks and the bias, is replicated


def replicated(module: Attention, mesh: Any) -> None:
    distribute_module(module, mesh)


Parallelize = Callable[[Attention, Any], None]


CASES: dict[str, tuple[Attend, Parallelize, Placement]] = {
    "heads": (manual, tensor_parallel, None),
    "heads, causal": (masked, tensor_parallel, None),
    "heads, bias with gradient": (biased, tensor_parallel, None),
    "heads, padding by -1e9": (padded, tensor_parallel, None),
    "heads, logits": (capped, tensor_parallel, None),
    "heads, sdpa": (sdpa, tensor_parallel, None),
    "heads, grouped": (grouped, tensor_parallel, None),
    "heads, checkpoint": (checkpointed, tensor_parallel, None),
    "batch": (manual, replicated, Shard(0)),
    "batch, padding by -1e9": (padded, replicated, Shard(0)),
    "batch, bias with gradient": (biased, replicated, Shard(0)),
    "replicated": (manual, replicated, Replicate()),
}


def gradients(module: nn.Module) -> Tensor:
    """Of all parameters, as one vector, the same on all ranks."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in found])


def step(module: nn.Module, call: Callable[[Tensor], Tensor], mesh: Any = None, placement: Placement = None) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(B, N, WIDTH, dtype=torch.float64)
    x = x if placement is None else distribute_tensor(x, mesh, [placement], src_data_rank=None)
    module.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):  # DTensor has no other on a CPU
        out = call(x)
    (out.full_tensor() if isinstance(out, DTensor) else out).square().sum().backward()  # type: ignore[no-untyped-call]
    return gradients(module)


def make(attend: Attend) -> Attention:
    torch.manual_seed(0)
    return Attention(attend).double()


def one_case(attend: Attend, parallelize: Parallelize, placement: Placement, mesh: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    plain = make(attend)
    true = step(plain, plain)
    module = make(attend)
    parallelize(module, mesh)
    eager = step(module, module, mesh, placement)
    backend = SUSBackend(c=torch.inf, compiler="aot_eager", seed=3)
    compiled = torch.compile(module, backend=backend)
    exact = step(module, compiled, mesh, placement)
    backend.c = 2
    noisy = step(module, compiled, mesh, placement)
    return {
        "eager": float((eager - true).norm() / true.norm()),
        "exact": float((exact - true).norm() / true.norm()),
        "noise": float((noisy - true).norm() / true.norm()),
        "rewritten": backend.report.rewritten,
        "reason": next((site.reason for site in backend.report.sites), ""),
    }


def unbiased(mesh: Any, draws: int = 100) -> dict[str, Any]:
    """The mean gradient over draws, in standard errors along random directions."""
    module = make(manual)
    true = step(module, module)
    tensor_parallel(module, mesh)
    backend = SUSBackend(c=2, compiler="aot_eager", seed=3)
    compiled = torch.compile(module, backend=backend)
    directions = torch.randn(20, len(true), dtype=torch.float64)
    found = torch.stack([step(module, compiled) for _ in range(draws)])
    along = (found - true) @ directions.T
    errors = along.mean(0) / (along.std(0) / draws**0.5)
    return {"errors": float(errors.square().mean().sqrt())}


def function(mesh: Any) -> dict[str, Any]:
    """`sus_attention` on DTensors, in eager code."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, HEADS, N, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(B, 1, N, N) > 0.3
    weights = torch.randn(B, HEADS, N, 4, dtype=torch.float64)
    F.scaled_dot_product_attention(q, k, v, mask).mul(weights).sum().backward()
    shards = [distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_() for x in (q, k, v)]
    out = sus_attention(*shards, mask, c=torch.inf)
    out.full_tensor().mul(weights).sum().backward()  # type: ignore[no-untyped-call]
    errors = [
        float((a.grad.full_tensor() - b.grad).norm() / b.grad.norm()) for a, b in zip(shards, (q, k, v), strict=True)
    ]
    try:
        sus_attention(*(distribute_tensor(x.detach(), mesh, [Shard(2)]) for x in (q, k, v)))
    except ValueError as error:
        return {"errors": errors, "message": str(error)}
    return {"errors": errors, "message": ""}


def main(file: str, rank: int, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    seen = {}
    for name, case in CASES.items():
        try:
            seen[name] = one_case(*case, mesh)
        except Exception as error:
            seen[name] = {"error": f"{type(error).__name__}: {error}"[-2000:]}
    seen["unbiased"] = unbiased(mesh)
    seen["function"] = function(mesh)
    Path(f"{file}.{rank}").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
