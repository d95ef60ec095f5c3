"""c of sites, seeds and counts: on the host, and in a device state, for which the CPU stands in here."""

from __future__ import annotations

import gc
import math
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fx_passes import SUSBackend, device_state, runs, state, sus_backward
from fx_passes.device_state import mix, mix_last
from fx_passes.ops import dispatch
from fx_passes.ops.functional import draw
from fx_passes.ops.problem import Upstream
from fx_passes.state import Kept, State

CPU = torch.device("cpu")
LIKE = torch.zeros(1)


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_MIRRORED", {"cuda", "cpu"})


@pytest.fixture(params=["host", "device state"])
def _both(request: pytest.FixtureRequest) -> None:
    if request.param == "device state":
        request.getfixturevalue("mirrored")


both = pytest.mark.usefixtures("_both")


class Block(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.linear, self.checkpointed = nn.Linear(16, 16), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inside, x, use_reentrant=False) if self.checkpointed else self._inside(x)  # type: ignore[no-any-return]

    def _inside(self, x: Tensor) -> Tensor:
        y = self.linear(x).view(*x.shape[:2], 2, 8).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(y, y, y, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)


def gradient(compiled: Any, module: nn.Module, x: Tensor) -> Tensor:
    module.zero_grad()
    compiled(x).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_sites_have_the_common_c_or_their_own() -> None:
    s = State(3.0)
    s.set_site_c({2: 5, 0: math.inf})
    s.set_site_c({2: 6})
    assert [s.c_of(i) for i in range(3)] == [math.inf, 3, 6]
    assert s.site_c == {0: math.inf, 2: 6}
    again = pickle.loads(pickle.dumps(s))
    assert (again.c, again.site_c) == (3, s.site_c)
    s.c = 4
    assert [s.c_of(i) for i in range(3)] == [4, 4, 4]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({1: 0}, ValueError, "c of site 1 must be above 0"),
        ({1: 5, 2: None}, TypeError, "c of site 2 must be a number"),
        ({-1: 5}, ValueError, "a site's number must be in .*, but it is -1"),
        ({"a": 5}, TypeError, "a site's number must be an int of at least 0, but it is 'a'"),
    ],
)
def test_bad_c_of_sites_changes_nothing(given: Any, error: type[Exception], message: str) -> None:
    s = State(3.0)
    s.set_site_c({0: 7})
    with pytest.raises(error, match=message):
        s.set_site_c(given)
    assert s.site_c == {0: 7}


@both
def test_a_draw_gives_c_of_the_sites_asked_for_and_a_new_seed() -> None:
    s = State(3.0, seed=5)
    c, seed = draw(LIKE, s.id, [4, 1])
    s.set_site_c({1: 9})
    again, other = draw(LIKE, s.id, [4, 1])
    assert (c.tolist(), again.tolist()) == ([3, 3], [3, 9])  # what was drawn before keeps its c
    assert c.dtype == again.dtype == torch.float64
    assert [int(seed), int(other)] == [mix(5, 0, 1), mix(5, 0, 2)]
    assert (seed.dtype, seed.shape, s.counter) == (torch.int64, (), 2)


def seeds(state: State, count: int = 2) -> list[int]:
    return [int(draw(LIKE, state.id, [0])[1]) for _ in range(count)]


@both
def test_seeds_follow_manual_seed_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    s = State(3.0)

    def run(number: int) -> list[int]:
        torch.manual_seed(number)
        return seeds(s)

    first, second = run(1), run(2)
    assert len({*first, *second}) == 4
    assert s.counter == 2
    assert run(1) == first
    assert run(1) == first  # also when the generator had this seed already
    s.counter = 1
    assert seeds(s, 1) == first[1:]
    monkeypatch.setenv("RANK", "3")
    s.counter = 0
    assert not {*seeds(s)} & {*first, *second}


@both
def test_states_of_a_run_draw_apart_and_repeat_with_it() -> None:
    def run() -> list[int]:
        torch.manual_seed(0)
        found, old = [], State(1.0)
        for _ in range(3):
            found += seeds(State(1.0), 1) + seeds(old)
            State(1.0)  # one that never draws changes nothing
        return found

    first = run()
    assert len({*first}) == 9
    assert run() == first


def _forked(state: State) -> list[int]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seeds(state)


def _put_back(state: State, copied: bool) -> list[int]:
    before = torch.get_rng_state()
    before = before.clone() if copied else before
    torch.manual_seed(0)
    found = seeds(state)
    torch.set_rng_state(before)
    return found


@pytest.mark.parametrize("consumed", [0, 700])
@pytest.mark.parametrize("outer", [0, 1])
@both
def test_a_fork_of_the_generator_restarts_nothing(outer: int, consumed: int) -> None:
    from torch.random import fork_rng  # whatever name it was imported by

    def run() -> list[int]:
        torch.manual_seed(outer)
        s, found = State(1.0), []
        for _ in range(3):
            torch.rand(consumed)
            found += seeds(s) + _forked(s)
            with fork_rng():
                torch.manual_seed(0)
                again = seeds(s)
                torch.manual_seed(0)
                assert seeds(s) == again
                with fork_rng():
                    found += seeds(s)
                    torch.manual_seed(0)
                    found += seeds(s)
            found += again
            with fork_rng():
                found += seeds(s)
        return found

    first = run()
    assert len({*first}) == len(first) == 36
    assert run() == first


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("outer", [0, 1])
@both
def test_a_generator_state_put_back_restarts_nothing(outer: int, copied: bool) -> None:
    torch.manual_seed(outer)
    s, found = State(1.0), []
    for _ in range(3):
        torch.rand(3)
        found += seeds(s)
        _put_back(s, copied)
    assert len({*found}) == 6


def test_a_process_with_ranks_or_forked_off_draws_apart() -> None:
    torch.manual_seed(0)
    s = State(1.0)
    known = {*seeds(s)}
    for _ in range(2):
        child = _in_child(lambda: [*seeds(s), s.counter])
        assert child.pop() == 4
        assert not known & {*child}
        known |= {*child}
    assert not known & {*seeds(s)}

    def reseeded() -> list[int]:
        torch.manual_seed(0)
        return seeds(State(1.0))

    assert _in_child(reseeded) == reseeded()


def test_a_lock_that_a_thread_holds_does_not_hang_a_child() -> None:
    s, held, done = State(1.0), threading.Event(), threading.Event()

    def hold() -> None:
        with s._lock, runs._lock:
            held.set()
            done.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        child = _in_child(lambda: [*seeds(s), torch.get_rng_state().numel(), int(torch.manual_seed(0).initial_seed())])
    finally:
        done.set()
        thread.join()
    assert child[2:] == [torch.get_rng_state().numel(), 0]


def _in_child(work: Callable[[], list[int]]) -> list[int]:
    """What a function gives in a child made by `os.fork`; it must not take longer than 30 s."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(30)
        os.write(write, " ".join(map(str, work())).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    return [int(word) for word in text.split()]


@both
def test_a_resumed_state_goes_on_as_the_saved_one() -> None:
    torch.manual_seed(5)
    other, s = State(1.0), State(1.0)
    seeds(other)
    seeds(s, 3)
    saved, rest = s.position, seeds(s)
    torch.manual_seed(5)
    early, again = State(1.0), State(1.0)
    first = seeds(early, 1)
    seeds(State(1.0))  # has the saved number, and is gone
    again.resume(*saved)
    assert seeds(again) == rest
    assert not {*seeds(early), *first} & {*rest}
    torch.manual_seed(5)
    holder, third = [State(1.0) for _ in range(2)], State(1.0)
    taken = [x for state in holder for x in seeds(state, 1)]
    third.resume(*saved)
    assert seeds(third) == rest
    assert len({*taken, *rest, *(x for state in holder for x in seeds(state, 3))}) == 10  # no number has two owners


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("counter", "x", TypeError, "counter must be an int of at least 0, but it is 'x'"),
        ("counter", 1.5, TypeError, "counter must be"),
        ("counter", None, TypeError, "counter must be"),
        ("counter", True, TypeError, "counter must be"),
        ("counter", -1, ValueError, "counter must be in .* but it is -1"),
        ("counter", 1 << 63, ValueError, "counter must be in"),
        ("number", -1, ValueError, "number must be in"),
        ("number", "x", TypeError, "number must be"),
    ],
)
def test_a_bad_counter_changes_nothing(name: str, value: Any, error: type[Exception], message: str) -> None:
    torch.manual_seed(1)
    s = State(1.0)
    seeds(s)
    with pytest.raises(error, match=message):
        s.resume(**{"counter": 3, "number": 5, name: value})
    assert s.position == (2, 0)
    if name == "counter":
        with pytest.raises(error, match=message):
            s.counter = value
        with pytest.raises(error, match=message):
            State(1.0, counter=value)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"c": "30"}, TypeError, "c must be a number above 0.*'30'"),
        ({"c": True}, TypeError, "c must be a number"),
        ({"c": 1j}, TypeError, "c must be a number"),
        ({"c": None}, TypeError, "c must be a number"),
        ({"c": 10**400}, ValueError, "c must fit into a float"),
        ({"c": 10**5000}, ValueError, "c must fit into a float"),
        ({"c": torch.tensor([1.0, 2.0])}, TypeError, "c must be a number"),
        ({"c": torch.tensor(1.0, device="meta")}, TypeError, "c must be a number"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"seed": True}, TypeError, "seed must be an int"),
        ({"seed": "1"}, TypeError, "seed must be an int"),
        ({"seed": 1 << 64}, ValueError, "seed must be in"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        State(**{"c": 1.0, **arguments})


@both
def test_a_default_device_does_not_move_the_state() -> None:
    s = State(1.0)
    with torch.device("meta"):
        c, seed = draw(LIKE, s.id, [0, 1])
        s.c = 2
        s.counter = 7
        s.count(3, 1, 9, CPU)
    assert (c.device, c.tolist(), seed.device, s.counter) == (CPU, [1, 1], CPU, 7)
    assert s.pop_kept().entries == 3


def test_mixing_on_a_device_is_mixing_on_the_host() -> None:
    numbers = [0, 1, -1, 1 << 62, -(1 << 63), (1 << 63) - 1, 123456789]
    for base in numbers:
        for number in numbers:
            found = mix_last(torch.tensor(mix(base, 7)), torch.tensor(number))
            assert int(found) == mix(base, 7, number)


@pytest.mark.usefixtures("mirrored")
def test_what_a_captured_graph_replays_draws_anew_and_obeys_c() -> None:
    """A replay runs only what was done on the device, at the addresses of the capture."""
    s = State(3.0, seed=5)
    draw(LIKE, s.id, [4, 1])
    m = s._on_devices[CPU]
    vector = m.prepare([4, 1], s.c_of)
    addresses = [x.data_ptr() for x in (vector, m._counter, m._before, m._kept)]

    def replay() -> tuple[list[float], int]:
        m.count(torch.tensor(10), 4, 100)
        return vector.clone().tolist(), int(m.next_seed())

    assert replay() == ([3, 3], mix(5, 0, 2))
    s.c = 8
    s.set_site_c({1: 2, 7: 1})
    assert replay() == ([8, 2], mix(5, 0, 3))
    assert s.counter == 3
    s.counter = 0
    s.c = 6
    assert replay() == ([6, 6], mix(5, 0, 1))
    assert vars(s.pop_kept()) == {"entries": 30, "rows": 12, "dense": 300}
    assert s.pop_kept().rows == 0
    assert addresses == [x.data_ptr() for x in (m.prepare([4, 1], s.c_of), m._counter, m._before, m._kept)]


@pytest.mark.usefixtures("mirrored")
def test_setting_the_counter_takes_over_a_new_manual_seed() -> None:
    torch.manual_seed(1)
    s = State(3.0)
    draw(LIKE, s.id, [0])
    torch.manual_seed(2)
    fifth = seeds(s, 5)[4]
    torch.manual_seed(1)
    seeds(s)
    torch.manual_seed(2)
    s.counter = 4
    assert int(s._on_devices[CPU].next_seed()) == fifth


@both
def test_counts_can_be_put_back() -> None:
    """As the probe of the gradient's variance does."""
    s = State(3.0)
    s.count(torch.tensor(5), 2, 30, CPU)
    saved = Kept(**vars(s.kept))
    s.count(7, 2, 30, CPU)
    assert vars(s.kept) == {"entries": 12, "rows": 4, "dense": 60}
    s.kept = saved
    s.count(1, 1, 1, CPU)
    assert vars(s.pop_kept()) == {"entries": 6, "rows": 3, "dense": 31}


@pytest.mark.usefixtures("mirrored")
def test_host_and_devices_draw_apart() -> None:
    s = State(3.0, seed=1)
    device = [int(draw(LIKE, s.id, [0])[1]) for _ in range(2)]
    host = [s.next_seed() for _ in range(2)]
    assert len({*device, *host}) == 4


@pytest.mark.usefixtures("mirrored")
def test_a_stream_waits_for_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self) -> None:
            self.waited: list[Stream] = []

        def wait_stream(self, other: Stream) -> None:
            self.waited.append(other)

    s = State(1.0)
    draw(LIKE, s.id, [0])
    first, second = Stream(), Stream()
    used = [first]
    m = s._on_devices[CPU]
    monkeypatch.setattr(m, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: used[0])
    monkeypatch.setattr(device_state, "capturing", lambda _: False)
    for used[0] in (first, first, second, first):
        m.next_seed()
        m.count(1, 1, 1)
    assert (first.waited, second.waited) == ([second], [first])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_streams_of_a_gpu_share_no_draw() -> None:
    like, s = torch.zeros(1, device="cuda"), State(1.0)
    streams, drawn = [torch.cuda.Stream() for _ in range(2)], []
    for i in range(400):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(20_000 * (i % 3))
            drawn.append(draw(like, s.id, [0])[1])
    torch.cuda.synchronize()
    assert len({int(seed) for seed in drawn}) == s.counter == 400


@pytest.mark.usefixtures("mirrored")
def test_in_a_capture_nothing_may_be_new(monkeypatch: pytest.MonkeyPatch) -> None:
    s, other = State(3.0), State(3.0)
    torch.manual_seed(1)
    draw(LIKE, s.id, [0])
    monkeypatch.setattr(device_state, "capturing", lambda _: True)
    draw(LIKE, s.id, [0])
    with pytest.raises(RuntimeError, match="a site is new"):
        draw(LIKE, s.id, [0, 1])
    with pytest.raises(RuntimeError, match="the state must exist outside"):
        draw(LIKE, other.id, [0])
    torch.manual_seed(2)
    with pytest.raises(RuntimeError, match="the seed was changed before a capture"):
        draw(LIKE, s.id, [0])


def test_a_c_beyond_a_captured_graph_warns_once() -> None:
    s = State(3.0)
    s.captured(0, 7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.c = 7
        s.set_site_c({1: 30})
    with pytest.warns(UserWarning, match="c = 8 is above 7"):
        s.c = 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.c = 9


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
@both
def test_each_site_of_a_graph_has_its_c(compiler: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, tuple[float, int]] = {}
    forward, backward = dispatch.forward, dispatch.backward

    def spy(problem: Any, c: Tensor, seed: Tensor, *rest: Any) -> Any:
        seen[problem.static.site] = float(c), int(seed)
        return forward(problem, c, seed, *rest)

    def check(problem: Any, upstream: Upstream) -> Any:
        assert seen.pop(problem.static.site) == (float(upstream.c), int(upstream.seed))
        return backward(problem, upstream)

    monkeypatch.setattr(dispatch, "forward", spy)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    module, x = nn.Sequential(Block(), Block(checkpointed), Block()), torch.randn(1, 40, 16)
    backend = SUSBackend(c=3, compiler=compiler)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    first = gradient(compiled, module, x)
    assert {site: c for site, (c, _) in seen.items()} == {0: 3, 1: 3, 2: 3}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    backend.state.set_site_c({1: 5, 2: math.inf})
    second = gradient(compiled, module, x)
    assert {site: c for site, (c, _) in seen.items()} == {0: 3, 1: 5, 2: math.inf}
    backend.c = 4
    monkeypatch.setattr(dispatch, "backward", check)
    gradient(compiled, module, x)
    assert not seen  # each backward saw what its forward had
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert backend.state.counter == 3  # one draw per call of the graph
    assert not torch.equal(first, second)
    monkeypatch.setattr(dispatch, "backward", backward)
    backend.state.counter, backend.c = 0, 3
    assert torch.equal(gradient(compiled, module, x), first)
    assert not torch.equal(gradient(compiled, module, x), first)


def test_ids_of_graphs_are_used_again_and_those_of_calls_are_not() -> None:
    """The graphs of the next fit are then the same as those of the last one, which compilers' caches know."""
    gc.collect()
    first = SUSBackend(3)
    id, other = first.state.id, SUSBackend(3)
    assert other.state.id != id
    del first
    gc.collect()
    assert SUSBackend(3).state.id == id
    call = sus_backward(3)
    id = call.state.id
    del call
    gc.collect()
    assert sus_backward(3).state.id != id


@pytest.mark.slow
def test_inductor_finds_the_graphs_of_an_earlier_backend() -> None:
    from torch._dynamo.utils import counters

    def hits() -> int:
        torch._dynamo.reset()
        counters.clear()
        q = torch.randn(1, 2, 40, 8, requires_grad=True)
        backend = SUSBackend(3)
        torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q) * 3, backend=backend)(q).sum().backward()
        assert backend.report.rewritten == 1
        return counters["inductor"]["fxgraph_cache_hit"]

    hits()
    torch._dynamo.reset()
    gc.collect()
    assert hits() == 2
