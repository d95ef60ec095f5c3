"""Tries sizes of tiles, warps and stages on the backward, with what time is left.

A candidate is a dict of fields of `fx_passes.ops.cuda.config.TileConfig`. The best one per head size goes to
OUT/tuned.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fx_passes.ops.cuda import config
from fx_passes.state import State

from .calls import Shape, gradients, inputs, median, milliseconds, repeats_for, samplers, sus
from .rows import Row, Session

Candidate = dict[str, Any]
CANDIDATES: list[Candidate] = [
    *({"rows": rows, "dkdv": x} for rows, x in ((64, (4, 2)), (32, (4, 1)), (32, (4, 2)), (32, (4, 3)))),
    {"dq": (4, 1)},
    *({"probe": x, "probe_registers": most} for x in ((8, 1), (8, 2), (8, 3)) for most in (None, 128)),
    *({"probe_rows": 64, "probe": (4, x), "probe_registers": most} for x in (2, 3) for most in (None, 128)),
]


def shapes(session: Session) -> list[Shape]:
    if session.tiny:
        return [Shape(128, 32, 2, 2, dtype="float32")]
    return [Shape(32768, 128, 8, 8), Shape(32768, 64, 8, 8)]


def measure(session: Session, shape: Shape, candidate: Candidate) -> Iterator[Row]:
    q, k, v, grad = tensors = inputs(shape, session.device)
    attention = sus(shape, session.device, samplers(session)[0], 30.0, State(30.0))
    with config.override(**candidate):
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
    tune(session, CANDIDATES)
