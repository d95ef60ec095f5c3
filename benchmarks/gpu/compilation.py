"""Compiles what the later stages call, each configuration in a process of its own, into the caches that they share.

The stage's process imports torch, never touches the device, and forks: a fork costs nothing, a crash or a compilation
that does not end costs one configuration.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from fx_passes.ops.cuda import config
from fx_passes.state import State

from . import correct, headline, tune
from .calls import Shape, flex, gradients, inputs, samplers, sus
from .rows import Session, describe

PROCESSES = 14
LIMIT = 110.0  # seconds for one configuration


@dataclass(frozen=True)
class Task:
    key: str
    call: Callable[[], object]


def tasks(session: Session) -> list[Task]:
    """Longest first: FlexAttention by Inductor, then the shapes that are timed, then those that are checked."""
    found: dict[str, Task] = {}

    def add(key: str, call: Callable[[], object]) -> None:
        found.setdefault(key, Task(key, call))

    timed = headline.shapes(session)[: 1 if session.tiny else None]
    for sampler in samplers(session):
        for shape in timed:
            for c in headline.budgets(session, sampler, shape)[: 1 if session.tiny else None]:
                # The forms of the kernels do not depend on n beyond its divisibility; longer calls would fill memory.
                shape = replace(shape, n=min(shape.n, 8192), kind="peaked")
                key = f"{sampler} c={c:g} {shape.key}"
                add(key, lambda shape=shape, s=sampler, c=c: timed_call(session, shape, s, c))  # type: ignore[misc]
    if session.device == "cuda":
        for shape in timed:
            if shape.kind == "peaked":
                # Inductor writes every size into its kernels: the shape as it is timed.
                add(f"flex {shape.key}", lambda shape=shape: flex_call(session, shape))  # type: ignore[misc]
    for sampler in samplers(session):
        for case in correct.cases(session)[: 1 if session.tiny else None]:
            short = replace(case, shape=replace(case.shape, n=min(case.shape.n, 1024)))
            add(f"{sampler} {case.name}", lambda case=short, s=sampler: checked_call(session, case, s))  # type: ignore[misc]
    if hasattr(config, "override"):
        for shape in tune.shapes(session):
            for candidate in tune.CANDIDATES:
                short_shape = replace(shape, n=min(shape.n, 8192))
                key = f"tune d={shape.d} {candidate}"
                add(key, lambda shape=short_shape, x=candidate: list(tune.measure(session, shape, x)))  # type: ignore[misc]
    return list(found.values())


def timed_call(session: Session, shape: Shape, sampler: str, c: float) -> None:
    gradients(sus(shape, session.device, sampler, c, State(c)), inputs(shape, session.device))


def flex_call(session: Session, shape: Shape) -> None:
    gradients(flex(shape, session.device), inputs(shape, session.device))


def checked_call(session: Session, case: correct.Case, sampler: str) -> None:
    correct.Call(case, session.device).sus(sampler, case.c_of(sampler), 1)


def compile_one(session: Session, task: Task) -> None:
    """In the forked process."""
    begin = time.time()
    row: dict[str, object] = {"key": task.key}
    try:
        task.call()
        if session.device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        row["error"] = describe(error)
    session.write({**row, "seconds": round(time.time() - begin, 1)})


def run(session: Session) -> None:
    context = multiprocessing.get_context("fork")
    todo = tasks(session)[::-1]
    running: dict[int, tuple[BaseProcess, Task, float]] = {}
    at_once = min(PROCESSES, max(1, (os.cpu_count() or 2) - 1 if session.device == "cuda" else 2))
    begin, number = time.time(), len(todo)
    while todo or running:
        while todo and len(running) < at_once and session.left() > 5:
            task = todo.pop()
            process = context.Process(target=compile_one, args=(session, task))
            process.start()
            running[process.sentinel] = (process, task, time.time())
        if not running:
            break
        wait(list(running), timeout=0.5)
        for sentinel, (process, task, since) in list(running.items()):
            late = time.time() - since > LIMIT or session.left() < 1
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                process.kill()
            process.join()
            del running[sentinel]
            if late or process.exitcode:
                session.write({"key": task.key, "error": "too late" if late else f"exit code {process.exitcode}"})
    row = {"key": "all", "configurations": number, "not_begun": len(todo), "processes": at_once}
    session.write({**row, "seconds": round(time.time() - begin, 1)})
