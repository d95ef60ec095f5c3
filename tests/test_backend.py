"""SUSBackend: options, c as run-time state, seeds, compilers, no graph breaks, forward bits."""

from __future__ import annotations

import copy
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fx_passes import SUSBackend
from fx_passes.state import State

INF = float("inf")
ROOT = Path(__file__).parents[1]


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, c))


def model(layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention() for _ in range(layers)))


def step(function: Any, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    module.zero_grad()
    y = function(x)
    y.pow(2).mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("forward", ["auto", "library"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiled_training_step(compiler: str, forward: str) -> None:
    """Exact at inf, active at c = 4 with the same bits of the forward, c changed without a recompilation or a break."""
    module, x = model(), torch.randn(2, 100, 32)
    plain = torch.compile(module, backend=compiler)
    y0, g0 = step(plain, module, x)
    backend = SUSBackend(c=INF, compiler=compiler, forward=forward)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    y, g = step(compiled, module, x)
    assert torch.equal(y, y0) or forward == "auto"
    torch.testing.assert_close(y, y0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g, g0, rtol=1e-4, atol=1e-7)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    seen: list[float] = []
    backend.state.pop_kept()
    for c in (2.0, 4.0, 4.0, 1000.0):
        backend.c = c
        again, g = step(compiled, module, x)
        assert torch.equal(again, y)
        seen.append(float((g - g0).norm() / g0.norm()))
        assert backend.state.pop_kept().rows == 2 * 2 * 4 * 100
    assert seen[0] > 0.02
    assert seen[1] != seen[2]
    assert seen[3] < seen[1]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert backend.report.rewritten == 2
    assert backend.report.left == 0


def test_mean_over_steps_is_the_exact_gradient() -> None:
    module, x = model(1), torch.randn(1, 60, 32)
    _, exact = step(module, module, x)
    backend = SUSBackend(c=8, compiler="aot_eager")
    compiled = torch.compile(module, backend=backend)
    draws = torch.stack([step(compiled, module, x)[1] for _ in range(200)]).double()
    along = exact.double() / exact.double().norm() ** 2
    error = float((draws @ along).std() / 200**0.5)
    assert error < 0.01
    assert abs(float(draws.mean(0) @ along) - 1) < 4.5 * error


def test_inference_graphs_stay_as_they_are() -> None:
    module, x = model(), torch.randn(2, 50, 32)
    backend = SUSBackend(c=4, compiler="eager")
    compiled = torch.compile(module, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    assert backend.report.sites == []


def test_seeds_follow_manual_seed_and_differ_by_step_site_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = model(), torch.randn(1, 64, 32)

    def run(seed: int, steps: int = 2) -> list[Tensor]:
        torch._dynamo.reset()
        backend = SUSBackend(c=3, compiler="eager")
        compiled = torch.compile(module, backend=backend)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        grads = [step(compiled, module, x)[1] for _ in range(steps)]
        assert torch.equal(before, torch.get_rng_state())
        return grads

    first = run(5)
    assert not torch.equal(first[0], first[1])
    assert all(torch.equal(a, b) for a, b in zip(first, run(5), strict=True))
    assert not torch.equal(first[0], run(6)[0])
    monkeypatch.setenv("RANK", "1")
    assert not torch.equal(first[0], run(5)[0])


def test_state_counts_and_restarts() -> None:
    state = State(3.0)
    torch.manual_seed(1)
    seeds = [state.next_seed() for _ in range(3)]
    assert len(set(seeds)) == 3
    state.counter = 1
    assert state.next_seed() == seeds[1]
    torch.manual_seed(2)
    assert state.next_seed() not in seeds
    fixed = State(3.0, seed=4)
    one = fixed.next_seed()
    torch.manual_seed(1)
    assert State(3.0, seed=4).next_seed() == one


def test_change_of_c_takes_effect_at_the_next_forward() -> None:
    module, x = model(1), torch.randn(1, 64, 32)
    backend = SUSBackend(c=3, compiler="eager", seed=1)
    compiled = torch.compile(module, backend=backend)

    def gradient(later: float) -> Tensor:
        backend.state.counter, backend.c = 0, 3
        module.zero_grad()
        loss = compiled(x).pow(2).mean()
        backend.c = later
        loss.backward()
        return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])

    assert torch.equal(gradient(3), gradient(INF))


def test_dynamic_shapes() -> None:
    module = model()
    backend = SUSBackend(c=INF, compiler="aot_eager")
    compiled = torch.compile(module, backend=backend, dynamic=True)
    for n in (33, 50, 300):
        x = torch.randn(2, n, 32)
        _, exact = step(module, module, x)
        torch.testing.assert_close(step(compiled, module, x)[1], exact, rtol=1e-4, atol=1e-7)
    assert backend.report.rewritten == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_recompilation_counts_a_site_once() -> None:
    module = model()
    backend = SUSBackend(c=4, compiler="eager")
    compiled = torch.compile(module, backend=backend, dynamic=False)
    for n in (20, 30):
        step(compiled, module, torch.randn(1, n, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert backend.report.rewritten == 2
    assert [site.module for site in backend.report.sites] == ["0", "1"]
    assert "2 of 2 attentions rewritten" in str(backend.report)


def test_modules_of_torch_nn_that_are_compiled_in_place() -> None:
    """Also beside another backend, for which Dynamo goes on to skip them."""

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)

    x, graphs = torch.randn(2, 9, 16), []
    other = layer()
    other.compile(backend=lambda gm, _: graphs.append(gm) or gm)
    for module in (layer(), nn.Sequential(layer(), layer()), nn.TransformerEncoder(layer(), 2)):
        exact = step(module, module, x)[1]
        backend = SUSBackend(c=INF, compiler="eager")
        module.compile(backend=backend)
        for _ in range(2):
            other(x)
            torch.testing.assert_close(step(module, module, x)[1], exact, rtol=1e-4, atol=1e-6)
            backend.state.pop_kept()
            step(module, module, x)
            assert backend.state.pop_kept().rows == backend.report.rewritten * 2 * 2 * 9
        assert backend.report.rewritten == sum(isinstance(m, nn.MultiheadAttention) for m in module.modules())
    assert not graphs


def test_backend_by_name() -> None:
    """The entry point of the installed distribution, in a process of its own."""
    script = (
        "import torch, torch.nn.functional as F\n"
        "f = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend='sus',"
        " options={'c': 2, 'compiler': 'eager'})\n"
        "q = torch.randn(1, 1, 50, 8, requires_grad=True)\n"
        "grads = [torch.autograd.grad(f(q).pow(2).sum(), q)[0] for _ in range(2)]\n"
        "assert not torch.equal(*grads)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if "Invalid backend" in done.stderr:
        pytest.skip("the distribution is not installed here")
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    script = "import sys, {}; print([m for m in ('lightning', 'transformers', 'triton') if m in sys.modules])"
    command = [[sys.executable, "-c", script.format(module)] for module in ("fx_passes", "torch")]
    found, base = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True, check=True).stdout for c in command)
    assert found == base


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"c": 0}, ValueError, "c must be above 0"),
        ({"c": float("nan")}, ValueError, "c must be above 0 .*nan"),
        ({"c": None}, TypeError, "c must be a number"),
        ({"sampler": "x"}, ValueError, "sampler must be one of 'auto'.*'x'"),
        ({"compiler": "gcc"}, ValueError, "compiler must be one of 'inductor', 'aot_eager', 'eager'.*'gcc'"),
        ({"forward": "x"}, ValueError, "forward must be one of"),
        ({"seed": "x"}, TypeError, "seed must be an int or None.*'x'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SUSBackend(**arguments)


def test_copies_and_pickles() -> None:
    """Lightning deep-copies the arguments of torch.compile; spawned processes get a pickle."""
    backend = SUSBackend(c=5, seed=3)
    backend.state.next_seed()
    assert copy.deepcopy({"backend": backend})["backend"] is backend
    other = pickle.loads(pickle.dumps(backend))
    assert (other.c, other.state.seed, other.state.counter) == (5, 3, 1)
    assert other.state.id != backend.state.id


def test_bad_c_later_keeps_the_old_one() -> None:
    backend = SUSBackend(c=5)
    with pytest.raises(ValueError, match="c must be above 0"):
        backend.c = -1
    assert backend.c == 5


BY_NAME = """
import sys, torch, torch.nn.functional as F
from fx_passes import backend
torch.manual_seed(0)
q = torch.randn(1, 2, 64, 16, requires_grad=True)
torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="sus")(q).sum().backward()
[made] = backend._by_options.values()
print(made.c, made.sampler, made.compiler, made.state.seed, made.forward, made.report.rewritten)
"""


def test_options_of_the_name_come_from_the_environment() -> None:
    chosen = {"SUS_C": "64", "SUS_SAMPLER": "independent", "SUS_COMPILER": "eager", "SUS_SEED": "5"}
    environment = {**os.environ, **chosen, "SUS_FORWARD": "library"}
    command = [sys.executable, "-c", BY_NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["64.0", "independent", "eager", "5", "library", "1"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SUS_C", "many", "the environment variable SUS_C must be a number above 0 or inf, but it is 'many'"),
        ("SUS_C", "-3", "with SUS_C of the environment): c must be above 0"),
        ("SUS_SEED", "1.5", "the environment variable SUS_SEED must be an int, but it is '1.5'"),
        ("SUS_SAMPLER", "dense", "with SUS_SAMPLER of the environment): sampler must be one of"),
    ],
)
def test_a_bad_variable_is_named(variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fx_passes import backend

    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        backend.sus(*_graph())


def test_given_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from fx_passes import backend

    monkeypatch.setattr(backend, "_by_options", {})
    monkeypatch.setenv("SUS_C", "64")
    monkeypatch.setenv("SUS_COMPILER", "eager")
    backend.sus(*_graph(), options={"c": 7})
    backend.sus(*_graph())
    assert [made.c for made in backend._by_options.values()] == [7, 64]


def _graph() -> tuple[Any, list[Any]]:
    return torch.fx.symbolic_trace(lambda x: x + 1), [torch.ones(1)]


def test_a_registered_backend_is_known_by_its_name() -> None:
    backend = SUSBackend(c=64, compiler="eager").register("sus64")
    again = SUSBackend(c=8, compiler="eager").register("sus64")  # a notebook's cell that is run twice
    q = torch.randn(1, 2, 64, 16, requires_grad=True)
    torch._dynamo.reset()
    torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), backend="sus64")(q).sum().backward()
    assert (backend.report.rewritten, again.report.rewritten) == (0, 1)
    assert "sus64" in torch._dynamo.list_backends()


@pytest.mark.parametrize(
    ("name", "message"),
    [("inductor", "already has a backend 'inductor'"), ("sus", "already has a backend 'sus'"), ("", "an identifier")],
)
def test_a_name_that_cannot_be_registered(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SUSBackend().register(name)
    with pytest.raises(TypeError, match="name must be a string"):
        SUSBackend().register(3)  # type: ignore[arg-type]
