"""The rows that decide: forward and backward of SUS beside every dense attention of the machine, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fx_passes.state import State

from .calls import Attention, Shape, dense, gradients, inputs, median, milliseconds, repeats_for, samplers, sus
from .rows import Row, Session, describe

CAPTURED = 16384  # shapes up to this length are timed as a CUDA graph too: there the host is slower than the kernels
ROUNDS = 5  # three where one pass over all contenders takes more than two seconds
FIRST = 75.0  # seconds for the first calls of a contender, compilation with them
PASSES = 10  # forward and backward calls of each contender that a row takes at least: six to warm up, two rounds


def shapes(session: Session) -> list[Shape]:
    """In the order of their worth: what a cut takes is the least."""
    if session.tiny:
        return [Shape(256, 32, 2, 2, dtype="float32"), Shape(192, 32, 4, 2, dtype="float32")]
    long = [8192, 32768, 131072]
    return [
        *(Shape(n, 128, 32, 32) for n in long),
        *(Shape(n, 64, 32, 32) for n in long),
        *(Shape(n, 128, 32, 32, kind="diffuse") for n in long[:2]),
        Shape(32768, 128, 32, 8),
    ]


def budgets(session: Session, sampler: str, shape: Shape) -> list[float]:
    """The values of c: all of them for the first sampler and the shapes of the first rows."""
    first = sampler == samplers(session)[0] and shape.kind == "peaked" and shape.heads == shape.kv_heads
    return [30.0, 10.0, 100.0] if first and shape.d != 64 else [30.0]


@dataclass
class Contender:
    """One attention at one shape, with the times of its rounds in milliseconds."""

    name: str
    attention: Attention
    state: State | None = None
    c: float | None = None
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    graph: Any = None
    captured: list[float] = field(default_factory=list)
    first_ms: float = 0.0
    extra: Row = field(default_factory=dict)


def contenders(session: Session, shape: Shape) -> Iterator[tuple[str, Callable[[], Contender]]]:
    for name, make in dense(shape, session.device).items():
        if name == "flex" and session.left() < 60:  # it compiles
            continue
        yield name, lambda name=name, make=make: Contender(name, make())  # type: ignore[misc]
    for sampler in samplers(session):
        for c in budgets(session, sampler, shape):

            def build(sampler: str = sampler, c: float = c) -> Contender:
                state = State(c)
                return Contender(f"sus {sampler}", sus(shape, session.device, sampler, c, state), state, c)

            yield f"sus {sampler}", build


def warm(session: Session, contender: Contender, tensors: list[Tensor], exact: list[Tensor] | None) -> list[Tensor]:
    """First calls: compilation, peak memory, kept keys, noise; then the time of one call."""
    cuda = session.device == "cuda"
    gradients(contender.attention, tensors)
    if contender.state is not None:
        contender.state.pop_kept()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found = list(gradients(contender.attention, tensors))
    if cuda:
        contender.extra["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    if contender.state is not None:
        kept = contender.state.pop_kept()
        contender.extra["kept_per_row"] = round(kept.entries / kept.rows, 1) if kept.rows else None
        contender.extra["kept_fraction"] = round(kept.entries / kept.dense, 4) if kept.dense else None
        contender.extra["slow"] = {r: k for reasons in contender.state.slow.values() for r, k in reasons.items()}
        if exact is not None:
            for name, g, e in zip("qkv", found, exact, strict=True):
                contender.extra[f"noise_{name}"] = float(f"{float((g.float() - e).norm() / e.norm()) ** 2:.3g}")
    contender.first_ms = milliseconds(lambda: gradients(contender.attention, tensors), session.device, 1)
    begin = time.perf_counter()
    for _ in range(3):
        gradients(contender.attention, tensors)
    if cuda:  # how long the host needs to launch a step: above both_ms, it is the host that is measured
        contender.extra["host_ms"] = float(f"{(time.perf_counter() - begin) * 1e3 / 3:.3g}")
        torch.cuda.synchronize()
        if tensors[0].shape[2] <= CAPTURED:
            contender.graph = captured(contender, tensors)
    return found


def captured(contender: Contender, tensors: list[Tensor]) -> Any:
    """Forward and backward as a CUDA graph, whose replays cost the host nothing; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            gradients(contender.attention, tensors)
    except RuntimeError:
        return None
    return graph


def time_round(session: Session, contender: Contender, tensors: list[Tensor]) -> None:
    q, k, v, grad = tensors
    repeats = repeats_for(contender.first_ms, session.tiny)
    attention, device = contender.attention, session.device
    contender.both.append(milliseconds(lambda: gradients(attention, tensors), device, repeats))
    contender.forward.append(milliseconds(lambda: attention(q, k, v), device, repeats))
    if contender.graph is not None:
        contender.captured.append(milliseconds(contender.graph.replay, device, repeats))
    out = attention(q, k, v)
    contender.backward.append(
        milliseconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), device, repeats)
    )


def measure(session: Session, shape: Shape, skip: set[str], cost: Callable[[float], None]) -> Iterator[Row]:
    """One row per contender, when all rounds are done; `cost` gets the seconds of one pass over all contenders.

    A contender of `skip` has ended a process before: it is left out.
    """
    tensors = inputs(shape, session.device)
    base = {"n": shape.n, "d": shape.d, "heads": shape.heads, "kv_heads": shape.kv_heads, "kind": shape.kind}
    base |= {"batch": shape.batch, "dtype": shape.dtype}
    ready: list[Contender] = []
    exact: list[Tensor] | None = None
    for name, build in contenders(session, shape):
        if name in skip:
            yield {**base, "name": name, "note": "not run: it crashed, hung or broke the CUDA context"}
            continue
        yield {"trying": name}
        session.within(FIRST)
        try:
            contender = build()
            found = warm(session, contender, tensors, exact)
        except Exception as error:
            yield {**base, "name": name, "note": f"not run: {describe(error)}"}
            if session.device == "cuda":
                torch.cuda.synchronize()  # raises if the context is broken
                torch.cuda.empty_cache()
            continue
        if exact is None:  # the first dense peer's: what SUS deviates from it beyond rounding is noise
            exact = [x.float() for x in found]
        ready.append(contender)
    del exact
    session.within(240)
    seconds, rounds = sum(x.first_ms for x in ready) / 1e3, 0
    cost(seconds)
    for _ in range(2 if session.tiny else 3 if seconds > 2 else ROUNDS):
        need = sum(2.2 * max(x.first_ms, 60) for x in ready) / 1e3
        if rounds and session.left() < need + 2:
            break
        for contender in ready:
            yield {"trying": contender.name}
            time_round(session, contender, tensors)
        rounds += 1
    yield from table_rows(base, ready, rounds)


def table_rows(base: Row, ready: list[Contender], rounds: int) -> Iterator[Row]:
    """Medians, and the speed-up against the fastest dense peer: the median of the ratios round by round."""
    peers = [x for x in ready if x.state is None]
    best = min(peers, key=lambda x: median(x.both)) if peers else None
    for x in ready:
        row = {**base, "name": x.name, "c": x.c, "rounds": rounds}
        for part in ("forward", "backward", "both"):
            row[f"{part}_ms"] = float(f"{median(getattr(x, part)):.4g}")
        row["spread"] = round((max(x.both) - min(x.both)) / median(x.both), 3)
        if best is not None:
            row["best_peer"] = best.name
            row["speed_up"] = round(median(b / own for b, own in zip(best.both, x.both, strict=True)), 3)
            if x.captured and best.captured:
                row["captured_ms"] = float(f"{median(x.captured):.4g}")
                row["captured_speed_up"] = round(median(best.captured) / median(x.captured), 3)
            if x is best:
                row["ceiling"] = round(median(x.both) / median(x.forward), 2)
        yield {**row, **x.extra}


def run(session: Session) -> None:
    passes: dict[tuple[int, str], tuple[Shape, float]] = {}  # by d and kind: seconds of one pass over all contenders
    for shape in shapes(session):
        key = shape.key
        if (shape.d, shape.kind) in passes:
            measured, seconds = passes[shape.d, shape.kind]
            seconds *= (shape.n / measured.n) ** 2 * shape.heads / measured.heads
            shape = fewer_heads(shape, seconds * PASSES, session.left() * 0.7)

        def cost(seconds: float, shape: Shape = shape) -> None:
            passes[shape.d, shape.kind] = (shape, seconds)

        name, skip = attempt(session, key)
        session.unit(name, lambda shape=shape, skip=skip, cost=cost: measure(session, shape, skip, cost), 240)  # type: ignore[misc]  # fmt: skip


def attempt(session: Session, key: str) -> tuple[str, set[str]]:
    """The key of the unit's next attempt (that of the last one, if it ended), and whom the earlier ones ended with."""
    rows, skip = session.own(), set[str]()
    for number in range(1, 10):
        name = key if number == 1 else f"{key}, attempt {number}"
        own = [row for row in rows if row["key"] == name]
        if not any(row.get("begun") for row in own) or any(row.get("ended") for row in own):
            break
        skip |= set([row["trying"] for row in own if "trying" in row][-1:])
    return name, skip


def fewer_heads(shape: Shape, seconds: float, left: float) -> Shape:
    """The shape with as many heads as fit into the time left, where all of them take `seconds`; the row shows them."""
    while seconds > left and shape.kv_heads % 2 == 0 and shape.heads > 4:
        shape, seconds = replace(shape, heads=shape.heads // 2, kv_heads=shape.kv_heads // 2), seconds / 2
    return shape
