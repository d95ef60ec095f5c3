"""What changes from step to step: c, the counter of draws, and the counts of kept entries.

A compiled graph reads it through one operator per call, `sus::draw`, so that no number of it is ever a guard or a
constant of the graph: changing c recompiles nothing.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def check_c(c: Any, name: str = "c") -> float:
    """The number c as a float; ValueError if it is not a number above 0 (infinity is allowed)."""
    try:
        value = float(c)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number above 0 or float('inf'), but it is {c!r}") from None
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be above 0 (float('inf') is the exact backward), but it is {value}")
    return value


def mix(*numbers: int) -> int:
    """A well-mixed signed 64-bit number of the given ones (SplitMix64's finaliser, chained)."""
    h = 0
    for number in numbers:
        h = (h + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h - (1 << 64) if h >> 63 else h


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0") or 0)


@dataclass
class Kept:
    """Counts since the last `State.pop_kept`: entries kept, rows, and entries that a dense backward would use."""

    entries: float = 0.0
    rows: float = 0.0
    dense: float = 0.0


@dataclass(eq=False)
class State:
    """c, the random counter and the counts of one backend.

    Args:
        c: expected number of kept entries per row, above 0; `float("inf")` is the exact backward.
        seed: fixes the draws; None takes `torch.initial_seed()`, hence what `torch.manual_seed` was given.
    """

    c: float
    seed: int | None = None
    counter: int = 0
    id: int = field(init=False)
    kept: Kept = field(init=False, default_factory=Kept)

    def __post_init__(self) -> None:
        self.id = next(_ids)
        self._base: int | None = None
        self._lock = threading.Lock()
        _states[self.id] = self

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, check_c(value) if name == "c" else value)

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is another state with the same c, seed and counter."""
        return State, (self.c, self.seed, self.counter)

    def next_seed(self) -> int:
        """A fresh seed. It differs by rank, and it starts anew when `torch.manual_seed` sets another seed."""
        base = torch.initial_seed() if self.seed is None else self.seed
        with self._lock:
            if self._base is not None and base != self._base:
                self.counter = 0
            self._base = base
            self.counter += 1
            return mix(base, _rank(), self.counter)

    def count(self, entries: float | Tensor, rows: float, dense: float) -> None:
        """Adds to the counts. `entries` may be on a device: it becomes a number in `pop_kept`, so that nobody waits."""
        with self._lock:
            self.kept.entries += entries  # type: ignore[assignment]
            self.kept.rows += rows
            self.kept.dense += dense

    def pop_kept(self) -> Kept:
        """The counts since the last call, which starts them anew."""
        with self._lock:
            kept, self.kept = self.kept, Kept()
        return Kept(float(kept.entries), kept.rows, kept.dense)


_ids = count(1)
_states: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


def get_state(id: int) -> State | None:
    return _states.get(id)


@torch.library.custom_op("sus::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: Tensor, state: int) -> tuple[Tensor, Tensor]:
    """c (float64) and a fresh seed (int64) of a state, as 0-dim tensors on the device of `like`."""
    found = _states.get(state)
    if found is None:
        raise RuntimeError("the SUSBackend that compiled this graph no longer exists; keep a reference to it")
    return (
        torch.tensor(found.c, dtype=torch.float64, device=like.device),
        torch.tensor(found.next_seed(), dtype=torch.int64, device=like.device),
    )


@draw.register_fake
def _(like: Tensor, state: int) -> tuple[Tensor, Tensor]:
    return like.new_empty((), dtype=torch.float64), like.new_empty((), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Any) -> tuple[None, None]:
    return None, None


draw.register_autograd(_backward, setup_context=_setup)
