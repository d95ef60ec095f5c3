"""The kernels on a GPU: the interpreter's checks at larger sizes, determinism, no host sync, CUDA graphs, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fx_passes.ops.functional import attend
from fx_passes.state import State, draw

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ops.cuda.calls import check, problem, run

pytestmark = pytest.mark.gpu

FEATURES: dict[str, Any] = {
    "plain": {},
    "causal": {"static": {"right": 0}},
    "window": {"static": {"left": 300, "right": 0}},
    "softcap": {"static": {"softcap": 5.0}},
    "dropout": {"static": {"dropout_p": 0.2}},
    "library": {"static": {"forward": "library"}},
    "sinks": {"sinks": torch.tensor([0.5, -1.0])},
    "bias": {"attn_bias": torch.randn(1, 2, 700, 1000)},
    "padding": {"attn_mask": torch.rand(1, 1, 1, 1000) < 0.7},
    "mask": {"attn_mask": torch.rand(1, 2, 700, 1000) < 0.5},
    "ids": {"query_ids": torch.arange(700)[None] // 200, "key_ids": torch.arange(1000)[None] // 200},
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features(name: str, dtype: torch.dtype) -> None:
    check(problem(m=700, n=1000, d=64, e=64, dtype=dtype, **FEATURES[name]), 30.0)


@pytest.mark.parametrize("d", [16, 32, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_sizes_and_groups(d: int, dtype: torch.dtype) -> None:
    check(problem(b=2, h=4, g=2, m=513, n=513, d=d, e=d, dtype=dtype, static={"right": 0}), 30.0)


def test_deterministic() -> None:
    p = problem(m=2000, n=2000, d=64, e=64, dtype=torch.bfloat16, static={"right": 0}, spread=4.0)
    first, second = run(p, 30.0), run(p, 30.0)
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first["gradients"], name), getattr(second["gradients"], name))


def _call(state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    c, seed = draw(q, state.id)
    return attend(q, k, v, c, seed, right=0, state=state.id)


def test_the_host_never_waits() -> None:
    state = State(30.0, seed=0)
    q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    c, seed = draw(q, state.id)  # copies two numbers from the host
    attend(q, k, v, c, seed, right=0, state=state.id).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, c, seed, right=0, state=state.id).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_is_eager() -> None:
    state = State(30.0, seed=0)
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grads = []
    for call in (_call, torch.compile(_call, fullgraph=True)):
        state.counter = 0
        grads.append(torch.autograd.grad(call(state, q, k, v).sum(), (q, k, v)))
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


def test_cuda_graph() -> None:
    """A captured step with c and seed on the device; writing other numbers into them changes the draws of a replay."""
    state = State(30.0, seed=0)
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    c, seed = draw(q, state.id)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v, c, seed, right=0, state=state.id).sum(), (q, k, v))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [g.clone() for g in captured]
    seed.add_(1)
    graph.replay()
    assert not torch.equal(first[0], captured[0])
    for found, right in zip(captured, step(), strict=True):
        assert torch.equal(found, right)


@pytest.mark.slow
def test_long_and_linear_in_memory() -> None:
    """Offsets beyond 2^31 elements, and memory above the inputs within a kilobyte per token and head."""
    n, heads = 1 << 17, 4
    q, k, v = (torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    c, seed = torch.tensor(30.0, device="cuda", dtype=torch.float64), torch.tensor(1, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(q, k, v, c, seed, right=0)
    held = torch.cuda.memory_allocated() - before - out.nbytes
    assert held <= 640 * n * heads
    out.sum().backward()
    assert (torch.cuda.max_memory_allocated() - before) <= 2560 * n * heads
