"""Where the time of one forward and one backward goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.profiler import ProfilerActivity, profile

from fx_passes.state import State

from .calls import Shape, gradients, inputs, samplers, sus
from .headline import shapes
from .rows import Row, Session

SHOWN = 14


def profiled(session: Session, call: Callable[[], object], part: str) -> Row:
    cuda = session.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as result:
        call()
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in result.key_averages():
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if us > 0:
            found.append({"kernel": event.key[:90], "ms": round(us / 1e3, 4), "calls": event.count})
    found.sort(key=lambda x: -float(str(x["ms"])))
    return {"part": part, "total_ms": round(sum(float(str(x["ms"])) for x in found), 4), "kernels": found[:SHOWN]}


def measure(session: Session, shape: Shape, sampler: str) -> Iterator[Row]:
    q, k, v, grad = tensors = inputs(shape, session.device)
    attention = sus(shape, session.device, sampler, 30.0, State(30.0))
    for _ in range(2):
        gradients(attention, tensors)
    row = {"name": f"sus {sampler}", "c": 30.0, "n": shape.n, "d": shape.d, "heads": shape.heads, "kind": shape.kind}
    outs = []
    yield {**row, **profiled(session, lambda: outs.append(attention(q, k, v)), "forward")}
    yield {**row, **profiled(session, lambda: torch.autograd.grad(outs[0], (q, k, v), grad), "backward")}


def run(session: Session) -> None:
    for sampler in samplers(session)[:2]:
        for shape in [x for x in shapes(session) if x.kind == "peaked" and x.heads == x.kv_heads]:
            if shape.n > 100_000:
                shape = replace(shape, heads=8, kv_heads=8)
            key = f"{sampler} {shape.key}"
            session.unit(key, lambda shape=shape, sampler=sampler: measure(session, shape, sampler), 45)  # type: ignore[misc]
