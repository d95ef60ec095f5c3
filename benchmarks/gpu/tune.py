"""Tries sizes of tiles, warps and stages on the backward, with what time is left.

A candidate is a dict of fields of `fx_passes.ops.cuda.config.Config`. It acts inside
`with fx_passes.ops.cuda.config.override(**candidate):`; as long as config.py has no such function, the stage says so
and does nothing. The best one per head size goes to OUT/tuned.json.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fx_passes.ops.cuda import config
from fx_passes.state import State

from .calls import Shape, gradients, inputs, median, milliseconds, repeats_for, samplers, sus
from .rows import Row, Session

Candidate = dict[str, Any]
CANDIDATES: list[Candidate] = []


def override(candidate: Candidate) -> contextlib.AbstractContextManager[Any]:
    """The candidate's sizes instead of config.py's own; an empty one changes nothing."""
    if not candidate:
        return contextlib.nullcontext()
    return config.override(**candidate)  # type: ignore[attr-defined,no-any-return]


def shapes(session: Session) -> list[Shape]:
    if session.tiny:
        return [Shape(128, 32, 2, 2, dtype="float32")]
    return [Shape(32768, 128, 8, 8), Shape(32768, 64, 8, 8)]


def measure(session: Session, shape: Shape, candidate: Candidate) -> Iterator[Row]:
    q, k, v, grad = tensors = inputs(shape, session.device)
    attention = sus(shape, session.device, samplers(session)[0], 30.0, State(30.0))
    with override(candidate):
        gradients(attention, tensors)
        out = attention(q, k, v)

        def backward() -> object:
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

        repeats = repeats_for(milliseconds(backward, session.device, 1), session.tiny)
        ms = median(milliseconds(backward, session.device, repeats) for _ in range(5))
    yield {"n": shape.n, "d": shape.d, "candidate": candidate, "backward_ms": round(ms, 4)}


def tune(session: Session, candidates: Sequence[Candidate]) -> None:
    """Times the backward with config.py's sizes and with each candidate; writes the best of each head size."""
    for shape in shapes(session):
        for candidate in [{}, *candidates]:
            key = f"d={shape.d} {json.dumps(candidate, sort_keys=True)}"
            session.unit(key, lambda s=shape, c=candidate: measure(session, s, c), 60)  # type: ignore[misc]
    rows = [x for x in session.own() if "backward_ms" in x]
    best: dict[int, Row] = {}
    for row in sorted(rows, key=lambda x: -x["backward_ms"]):
        best[row["d"]] = row
    (session.out / "tuned.json").write_text(json.dumps(list(best.values()), indent=1) + "\n")


def run(session: Session) -> None:
    if CANDIDATES and not hasattr(config, "override"):
        session.write({"key": "override", "note": "not run: config.py has no override"})
        return
    tune(session, CANDIDATES)
