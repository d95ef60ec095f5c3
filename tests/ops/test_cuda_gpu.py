"""The kernels on a GPU: the interpreter's checks at larger sizes, determinism, no host sync, CUDA graphs, compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fx_passes import SUSBackend, sus_attention
from fx_passes.ops import tile_rule
from fx_passes.ops.cuda import library
from fx_passes.ops.functional import attend, draw
from fx_passes.ops.problem import Problem, Static
from fx_passes.state import State

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.ops.cuda import tile_calls
from tests.ops.cuda.calls import check, check_expectation, check_lost_lists, check_offsets, error, problem, run
from tests.ops.cuda.features import features

pytestmark = pytest.mark.gpu

FEATURES = features(700, 1000)


@pytest.fixture(autouse=True)
def _sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler "tile" draws at these small sizes too, where the dense backward would be faster."""
    monkeypatch.setattr(tile_rule, "LARGEST_SHARE", 0.9999)


SAMPLERS = pytest.mark.parametrize("sampler", ["systematic", "tile"])


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features(name: str, dtype: torch.dtype) -> None:
    check(problem(d=64, e=64, dtype=dtype, **FEATURES[name]), 30.0)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_features_of_the_tile_sampler(name: str, dtype: torch.dtype) -> None:
    tile_calls.check(tile_calls.problem(d=64, e=64, dtype=dtype, **FEATURES[name]), 3.0)


@pytest.mark.parametrize("d", [16, 32, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_sizes_and_groups(d: int, dtype: torch.dtype) -> None:
    sizes: dict[str, Any] = {"b": 2, "h": 4, "g": 2, "m": 513, "n": 513, "d": d, "e": d, "dtype": dtype}
    check(problem(**sizes, static={"right": 0}), 30.0)
    tile_calls.check(tile_calls.problem(**sizes, static={"right": 0}), 2.0)


@pytest.mark.parametrize("c", [0.5, 6.0, 60.0])
def test_gradients_for_any_c(c: float) -> None:
    """A list of one slot is a kernel of its own if its number is a constant, which Triton would make of 1."""
    check(problem(m=150, n=260), c)
    tile_calls.check(tile_calls.problem(m=150, n=260), c / 10)


def test_lost_lists_are_drawn_again() -> None:
    check_lost_lists(problem(m=700, n=1000, d=64, e=64, static={"right": 0}), 30.0)


def test_expected_gradient_is_exact() -> None:
    check_expectation(problem(h=1, m=32, n=96, spread=2.0), 4.0)
    tile_calls.check_expectation(tile_calls.problem(h=1, m=64, n=640, spread=2.0), 5.0)


@pytest.mark.slow
@SAMPLERS
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_inputs_spread_over_more_than_int32(dim: int, sampler: str) -> None:
    check_offsets(sampler, dim, 1 << 31, lambda size: torch.empty(size, dtype=torch.float16, device="cuda"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
@SAMPLERS
def test_a_device_that_is_not_the_current_one(sampler: str) -> None:
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    grads = []
    for device in ("cuda:0", "cuda:1"):
        inputs = [x.to(device).requires_grad_() for x in (q, k, v)]
        c, seed = torch.tensor(30.0, dtype=torch.float64, device=device), torch.tensor(1, device=device)
        out = attend(*inputs, c, seed, right=0, sampler=sampler)
        grads.append([g.cpu() for g in torch.autograd.grad(out.square().sum(), inputs)])
    for first, second in zip(*grads, strict=True):
        torch.testing.assert_close(first, second)


@SAMPLERS
def test_deterministic(sampler: str) -> None:
    static = {"right": 0, "sampler": sampler}
    p = problem(m=2000, n=2000, d=64, e=64, dtype=torch.bfloat16, static=static, spread=4.0)
    first, second = (run(p, 4.0) if sampler == "systematic" else tile_calls.run(p, 4.0) for _ in range(2))
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(first["gradients"], name), getattr(second["gradients"], name))


LIBRARY = {
    "flash": {"right": 0},
    "head size 80": {"d": 80, "right": 0},
    "head size 50": {"d": 50, "right": 0},
    "full": {},
    "groups": {"g": 2, "right": 0},
    "padding": {"mask": (2, 1, 1, 700)},
    "mask": {"mask": (2, 1, 700, 700)},
    "odd mask": {"m": 333, "n": 333, "mask": (2, 1, 333, 333)},
    "cross": {"m": 300},
}


@pytest.mark.parametrize("name", LIBRARY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", [None, "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_the_librarys_bits(name: str, dtype: torch.dtype, kernel: str | None) -> None:
    """Forward, and at c = inf gradients, are those of F.scaled_dot_product_attention; at a finite c the forward is."""
    case = {"h": 4, "g": 4, "m": 700, "n": 700, "d": 64, "right": None, "mask": None, **LIBRARY[name]}
    q, k, v = (
        torch.randn(2, heads, length, case["d"], device="cuda", dtype=dtype, requires_grad=True)
        for heads, length in ((case["h"], case["m"]), (case["g"], case["n"]), (case["g"], case["n"]))
    )
    mask = None
    if case["mask"]:
        mask = torch.rand(case["mask"], device="cuda") < 0.7
    backends = [getattr(SDPBackend, kernel)] if kernel else list(SDPBackend.__members__.values())[1:]
    options: dict[str, Any] = {"attn_mask": mask, "is_causal": case["right"] == 0, "enable_gqa": case["g"] < case["h"]}
    with sdpa_kernel(backends):
        try:
            right = F.scaled_dot_product_attention(q, k, v, **options)
        except RuntimeError:
            pytest.skip("the library has no such kernel for this call")
        # In the query's layout: cuDNN's plans are cached without dO's strides (torch 2.11), and those of another layout
        # would be taken for it, by the library's own backward too.
        grad = torch.randn_like(q)
        wanted = torch.autograd.grad(right, (q, k, v), grad)
        for c in (float("inf"), 2.0):
            out = sus_attention(q, k, v, **options, c=c, sampler="tile")
            found = torch.autograd.grad(out, (q, k, v), grad)
            plain = library.kernel_of(_as_problem(q, k, v, mask, case["right"])) == 0
            if plain:  # the library computes it from a matrix, and we do not
                torch.testing.assert_close(out, right, atol=2e-2, rtol=2e-2)
                continue
            assert torch.equal(out, right)
            if c == float("inf"):
                for mine, its in zip(found, wanted, strict=True):
                    assert error(mine, its) < (1e-6 if dtype == torch.float32 else 1e-4)


def _as_problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, right: int | None
) -> Problem:
    static = Static(q.shape[-1] ** -0.5, right=right, sampler="tile")
    return Problem(q, k, v, mask, None, None, None, None, None, static)


def test_memory_of_the_tile_sampler() -> None:
    """Nothing beyond out and the logsumexp is kept for the backward, whose peak is linear."""
    n, heads = 1 << 15, 4
    q, k, v = (torch.randn(1, heads, n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    c, seed = torch.tensor(30.0, dtype=torch.float64), torch.tensor(1, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = attend(q, k, v, c, seed, right=0, sampler="tile")
    assert torch.cuda.memory_allocated() - before - out.nbytes <= 4 * n * heads + 8192
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before <= 2560 * n * heads


def _call(state: State, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sampler: str = "systematic") -> torch.Tensor:
    c, seed = draw(q, state.id, [0])
    return attend(q, k, v, c[0], seed, right=0, sampler=sampler, state=state.id)


@SAMPLERS
def test_the_host_never_waits(sampler: str) -> None:
    state = State(30.0, seed=0)
    q, k, v = (torch.randn(1, 4, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    _call(state, q, k, v, sampler).sum().backward()  # compiles, and makes the device state
    torch.cuda.set_sync_debug_mode("error")
    try:
        state.c = 20.0
        state.set_site_c({1: 5.0})
        _call(state, q, k, v, sampler).sum().backward()
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


def _captured(step: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


@SAMPLERS
def test_cuda_graph(sampler: str) -> None:
    """A captured step draws anew in each replay, obeys c and the counter, and counts what it keeps."""
    factor = 1.0 if sampler == "systematic" else 0.01  # of c: "tile" would keep all eight tiles
    state = State(100.0 * factor, seed=0)
    q, k, v = (torch.randn(1, 4, 512, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(_call(state, q, k, v, sampler).sum(), (q, k, v))

    graph, captured = _captured(step)
    kept = []
    for c in (100.0, 30.0, 30.0):
        state.c = c * factor
        state.counter = 7
        state.pop_kept()
        graph.replay()
        replayed = [g.clone() for g in captured]
        kept.append(state.pop_kept())
        assert state.counter == 8
        state.counter = 7
        for found, right in zip(replayed, step(), strict=True):
            assert torch.equal(found, right)
        state.pop_kept()
        graph.replay()
        assert not torch.equal(replayed[0], captured[0])
    assert kept[0].entries > 1.5 * kept[1].entries > 0
    assert kept[1].entries == kept[2].entries
    assert kept[0].rows == 4 * 512
    if sampler == "systematic":
        with pytest.warns(UserWarning, match="captured CUDA graph"):
            state.c = 1000.0
    graph.replay()


@SAMPLERS
def test_reduce_overhead(sampler: str) -> None:
    """CUDA graphs made by Inductor: the draws of one step after the other are those of eager code."""
    module = torch.nn.MultiheadAttention(128, 2, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 256, 128, device="cuda", dtype=torch.bfloat16)

    def gradients(mode: str | None) -> list[torch.Tensor]:
        torch._dynamo.reset()
        factor = 1.0 if sampler == "systematic" else 0.02
        backend = SUSBackend(c=20 * factor, sampler=sampler, seed=3)
        compiled = torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend=backend, mode=mode)
        found = []
        for i in range(8):
            backend.c = (20 if i < 6 else 8) * factor
            module.zero_grad()
            torch.compiler.cudagraph_mark_step_begin()
            compiled(x).float().square().mean().backward()
            found.append(torch.cat([p.grad.float().flatten() for p in module.parameters() if p.grad is not None]))
        assert backend.state.counter == 8
        assert backend.state.pop_kept().rows == 8 * 2 * 2 * 256
        return found

    plain, graphs = gradients(None), gradients("reduce-overhead")
    for i, (found, right) in enumerate(zip(graphs, plain, strict=True)):
        torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-3 * float(right.abs().max()))
        assert not any(torch.equal(found, other) for other in graphs[:i])


@pytest.mark.slow
def test_long_and_linear_in_memory() -> None:
    """What is held for the backward, and the peak above the inputs, per token and head."""
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
