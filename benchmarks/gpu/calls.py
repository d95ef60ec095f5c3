"""Attention calls that are compared: their inputs, the dense peers, SUS, and how they are timed."""

from __future__ import annotations

import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fx_passes import sus_attention
from fx_passes.ops.problem import SAMPLERS
from fx_passes.state import State

from .rows import MEASURED, Session

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention call. `kind` is that of the inputs: see `inputs`."""

    n: int
    d: int
    heads: int
    kv_heads: int
    batch: int = 1
    dtype: str = "bfloat16"
    causal: bool = True
    kind: str = "peaked"

    @property
    def key(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.heads != self.kv_heads else f"{self.heads}"
        return f"n={self.n} d={self.d} heads={heads} {self.dtype} {self.kind}"


def samplers(session: Session) -> list[str]:
    """Those to be measured; what this checkout does not have is left out."""
    found = [x for x in MEASURED if x in session.samplers and x in SAMPLERS]
    if not found:
        raise ValueError(f"--samplers must have one of this checkout's {', '.join(SAMPLERS)}, not {session.samplers}")
    return found


def inputs(shape: Shape, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v (that want gradients) and dO, laid out [batch, n, heads, d] as projections leave them, transposed.

    Kinds of attention:
        "diffuse": independent normal entries. Every row spreads over all of its keys: no sampler can do with less
            than its full budget. The worst case.
        "peaked": each row looks at the first key, at its neighbours and at a few distant places; neighbouring rows
            look at similar places. As sparse as SmolLM2-135M's heads: with c = 30 and causal, d = 64, the paper's rule
            keeps 14 keys per row at n = 2048 and 17 at n = 8192, the rule on tiles of 64 keys 430 to 470 and 800.
        "sink": "diffuse", but the first key of every sequence takes most of the weight.
    """
    g = torch.Generator(device).manual_seed(seed)
    b, n, d, dtype = shape.batch, shape.n, shape.d, getattr(torch, shape.dtype)

    def normal(heads: int) -> Tensor:
        return torch.randn(b, n, heads, d, generator=g, device=device)

    q, k, v, grad = (normal(h) for h in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads))
    if shape.kind == "peaked":
        _peak(q, k, g)
    elif shape.kind == "sink":
        _sink(q, k, 0.8 * math.sqrt(d))
    made = [x.to(dtype).transpose(1, 2) for x in (q, k, v, grad)]
    return [x.requires_grad_(i < 3) for i, x in enumerate(made)]


def _sink(q: Tensor, k: Tensor, strength: float) -> None:
    """All queries agree with the first key in one direction: `strength` is added to its logit / sqrt(d)."""
    q[..., 0] = 1 + 0.1 * q[..., 0]
    k[:, 0, :, 0] = strength * math.sqrt(q.shape[-1])


def _peak(q: Tensor, k: Tensor, g: torch.Generator) -> None:
    n = q.shape[1]
    groups = q.shape[2] // k.shape[2]
    # What a place is about: half changes every 32 places, half every 512, and topics come back.
    topics = torch.randn(64, k.shape[2], k.shape[3], generator=g, device=q.device)
    about = torch.zeros_like(k)
    for length, weight in ((32, 0.8), (512, 0.6)):
        which = torch.randint(0, 64, (k.shape[0], n // length + 1), generator=g, device=q.device)
        about += weight * topics[which].repeat_interleave(length, 1)[:, :n]
    about *= (64 / q.shape[3]) ** 0.25  # so that its part in the logits does not depend on d
    k.mul_(0.5).add_(about)
    q.mul_(0.7).add_(about.repeat_interleave(groups, 2), alpha=0.85)
    _sink(q, k, 9.5)


def sus(shape: Shape, device: str, sampler: str, c: float, state: State, seed: int = 1) -> Attention:
    """SUS with c and seed on the device, so that no call copies a number there; `state` counts the kept entries."""
    c_tensor = torch.tensor(c, dtype=torch.float64, device=device)
    seed_tensor = torch.tensor(seed, device=device)
    state.c = c
    options: dict[str, Any] = {"c": c_tensor, "seed": seed_tensor, "sampler": sampler}
    gqa = shape.heads != shape.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sus_attention(q, k, v, is_causal=shape.causal, enable_gqa=gqa, state=state.id, **options)

    return call


def sdpa(shape: Shape, backend: SDPBackend) -> Attention:
    gqa = shape.heads != shape.kv_heads

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=gqa)

    return call


def flex(shape: Shape, device: str) -> Attention:
    """FlexAttention, compiled, with a causal block mask that is written down: evaluating it takes n x n memory."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    mask, size = None, 128
    if shape.causal:
        blocks = -(-shape.n // size)
        places = torch.arange(blocks, device=device, dtype=torch.int32)
        one = torch.ones(1, 1, blocks, device=device, dtype=torch.int32)
        partial = torch.zeros(1, 1, blocks, blocks, device=device, dtype=torch.int32)
        partial[0, 0, :, 0] = places
        full = places.expand(1, 1, blocks, blocks).contiguous()
        mask = BlockMask.from_kv_blocks(
            one, partial, places[None, None].contiguous(), full, BLOCK_SIZE=size,
            mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(shape.n, shape.n),
        )  # fmt: skip
    # Else the shapes together reach the limit of recompilations, and eager code takes n x n memory.
    torch._dynamo.reset()
    torch._functorch.config.donated_buffer = False  # its backward is timed several times on one forward
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = shape.heads != shape.kv_heads
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)


def package(shape: Shape, name: str) -> Attention:
    """`flash_attn` (FA2) or `flash_attn_interface` (FA3), which take [batch, n, heads, d]."""
    function = importlib.import_module(name).flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=shape.causal)
        out = out[0] if isinstance(out, tuple) else out
        return out.transpose(1, 2)  # type: ignore[no-any-return]

    return call


PACKAGES = {"flash_attn": "fa2 package", "flash_attn_interface": "fa3 package"}


def dense(shape: Shape, device: str) -> dict[str, Callable[[], Attention]]:
    """The peers that this machine may have, by name; a call may still say that it does not take the shape."""
    found: dict[str, Callable[[], Attention]] = {"flash": lambda: sdpa(shape, SDPBackend.FLASH_ATTENTION)}
    if device == "cpu":
        found["math"] = lambda: sdpa(shape, SDPBackend.MATH)
        return found
    found["cudnn"] = lambda: sdpa(shape, SDPBackend.CUDNN_ATTENTION)
    for module, name in PACKAGES.items():
        if importlib.util.find_spec(module):
            found[name] = lambda module=module: package(shape, module)  # type: ignore[misc]
    found["flex"] = lambda: flex(shape, device)
    return found


def gradients(attention: Attention, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    q, k, v, grad = tensors
    return torch.autograd.grad(attention(q, k, v), (q, k, v), grad)


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Per call, of `repeats` calls one behind the other: the host waits after the last one only."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return 1e3 * (time.perf_counter() - begin) / repeats


def repeats_for(ms: float, tiny: bool) -> int:
    """As many calls as take about 60 ms: what one launch costs the host is hidden then."""
    return 1 if tiny else max(1, min(50, round(60 / max(ms, 1e-3))))


median = statistics.median
