"""What changes from step to step: c, the counter of draws, and the counts of kept entries.

A compiled graph reads it through one operator per call, `sus::draw`, so that no number of it is ever a guard or a
constant of the graph: changing c recompiles nothing. On a GPU the state lies in a `Mirror`, so that a captured CUDA
graph reads it too.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from fx_passes.mirror import Mirror, mix

# Devices whose draws a graph may replay without Python.
_MIRRORED = {"cuda"}


def check_c(c: Any, name: str = "c") -> float:
    """The number c as a float; ValueError if it is not a number above 0 (infinity is allowed)."""
    try:
        value = float(c)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number above 0 or float('inf'), but it is {c!r}") from None
    if math.isnan(value) or value <= 0:
        raise ValueError(f"{name} must be above 0 (float('inf') is the exact backward), but it is {value}")
    return value


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


class State:
    """c, the random counter and the counts of one backend.

    Args:
        c: expected number of kept entries per row, above 0; `float("inf")` is the exact backward.
        seed: fixes the draws; None takes `torch.initial_seed()`, hence what `torch.manual_seed` was given.
        counter: number of draws so far.

    Attributes:
        c: as above; setting it also takes back every c that single sites had.
        site_c: c of the sites that have their own.
        counter: number of draws so far; on a GPU, reading it waits for the device, setting it does not. Setting it
            also takes over a new `torch.manual_seed`, which a captured CUDA graph cannot see by itself.
        kept: the counts since `pop_kept`; on a GPU, reading them waits for the device.
        slow: by site, why calls took the slower PyTorch path, and how many did for each reason.
        id: the number by which operators find this state.
    """

    def __init__(self, c: float, seed: int | None = None, counter: int = 0) -> None:
        self.id = next(_ids)
        self.seed = seed
        self._c, self._site_c = check_c(c), dict[int, float]()
        self._counter, self._kept = counter, Kept()
        self.slow: dict[int, Counter[str]] = {}
        self._base: int | None = None
        self._mirrors: dict[torch.device, Mirror] = {}
        self._numbers: dict[torch.device | None, int] = {}  # of the streams: None is the host's
        self._captured: dict[int, float] = {}  # by site, the largest c for which a captured graph has room
        self._lock = threading.RLock()
        _states[self.id] = self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is another state with the same c, seed and counter."""
        return _rebuilt, (self._c, self._site_c, self.seed, self.counter)

    @property
    def c(self) -> float:
        return self._c

    @c.setter
    def c(self, value: float) -> None:
        self._set_c(check_c(value), {})

    @property
    def site_c(self) -> dict[int, float]:
        return dict(self._site_c)

    def set_site_c(self, values: Mapping[int, float]) -> None:
        """Gives sites (by `Site.number`) a c of their own, from the next forward on; other sites keep what they have.

        Raises:
            TypeError, ValueError: a key is no site's number, or a value no c; nothing is changed then.
        """
        for site in values:
            if not isinstance(site, int) or isinstance(site, bool) or site < 0:
                raise TypeError(f"a site must be the number of a site, an int of at least 0, but it is {site!r}")
        checked = {site: check_c(c, f"c of site {site}") for site, c in values.items()}
        self._set_c(self._c, {**self._site_c, **checked})

    def c_of(self, site: int) -> float:
        """c of a site: its own, or else the one of all."""
        return self._site_c.get(site, self._c)

    def _set_c(self, c: float, site_c: dict[int, float]) -> None:
        with self._lock:
            self._c, self._site_c = c, site_c
            for mirror in self._mirrors.values():
                mirror.write_c(c, site_c)
            beyond = [site for site, limit in self._captured.items() if self.c_of(site) > limit]
            if beyond:
                warnings.warn(
                    f"c = {self.c_of(beyond[0]):g} is above {self._captured[beyond[0]]:g}, the largest for which a "
                    f"captured CUDA graph has room: its replays draw with the latter, which is as unbiased. Capture "
                    f"again to use all of c.",
                    stacklevel=4,
                )
            for site in beyond:  # once for each capture
                del self._captured[site]

    def captured(self, site: int, limit: float) -> None:
        """A CUDA graph is being captured with room for at most this c; a larger one will be warned of."""
        self._captured[site] = limit

    @property
    def counter(self) -> int:
        with self._lock:
            return max([self._counter, *(mirror.counter for mirror in self._mirrors.values())])

    @counter.setter
    def counter(self, value: int) -> None:
        with self._lock:
            self._follow()
            self._set_counter(value)

    def _set_counter(self, value: int) -> None:
        self._counter = value
        for mirror in self._mirrors.values():
            mirror.counter = value

    def _follow(self) -> int:
        """The number that seeds all draws. Counters start anew when `torch.manual_seed` sets another."""
        base = torch.initial_seed() if self.seed is None else self.seed
        changed, self._base = self._base is not None and base != self._base, base
        for mirror in self._mirrors.values():
            mirror.follow(mix(base, _rank() + (mirror.number << 32)))
        if changed:
            self._set_counter(0)
        return base

    def _stream(self, device: torch.device | None) -> int:
        """The device that draws first has stream 0, so that one device draws the same whichever it is."""
        return self._numbers.setdefault(device, len(self._numbers))

    def next_seed(self) -> int:
        """A fresh seed. It differs by rank, and it starts anew when `torch.manual_seed` sets another seed."""
        with self._lock:
            base = self._follow()
            self._counter += 1
            return mix(base, _rank() + (self._stream(None) << 32), self._counter)

    def prepare(self, device: torch.device, sites: Sequence[int]) -> None:
        """Makes what draws for these sites need on a device, if it is one whose graphs may be captured."""
        with self._lock:
            if device.type in _MIRRORED:
                self._mirror(device).prepare(sites, self.c_of)

    def _mirror(self, device: torch.device) -> Mirror:
        if device not in self._mirrors:
            counter = self.counter
            self._mirrors[device] = Mirror(device, self._stream(device))
            self._mirrors[device].counter = counter
        return self._mirrors[device]

    def draw(self, device: torch.device, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
        """c of the sites (float64) and a fresh seed (0-dim int64), new tensors on the device."""
        if device.type not in _MIRRORED:
            c = torch.tensor([self.c_of(site) for site in sites], dtype=torch.float64, device=device)
            return c, torch.tensor(self.next_seed(), dtype=torch.int64, device=device)
        with self._lock:
            mirror = self._mirror(device)
            vector = mirror.prepare(sites, self.c_of)
            self._follow()
            return vector.clone(), mirror.next_seed()

    @property
    def kept(self) -> Kept:
        with self._lock:
            found = [vars(self._kept).values(), *(mirror.counts for mirror in self._mirrors.values())]
            return Kept(*(float(sum(x)) for x in zip(*found, strict=True)))

    @kept.setter
    def kept(self, value: Kept) -> None:
        with self._lock:
            self._kept = value
            for mirror in self._mirrors.values():
                mirror.clear_counts()

    def count(self, entries: float | Tensor, rows: float, dense: float, device: torch.device) -> None:
        """Adds to the counts what a backward on a device used; on a GPU nobody waits, and replays count too."""
        with self._lock:
            if device.type in _MIRRORED:
                self._mirror(device).count(entries, rows, dense)
                return
            self._kept.entries += float(entries)
            self._kept.rows += rows
            self._kept.dense += dense

    def note_slow(self, site: int, reason: str) -> None:
        """Counts a call of a site that took the PyTorch path."""
        with self._lock:
            self.slow.setdefault(site, Counter())[reason] += 1

    def pop_kept(self) -> Kept:
        """The counts since the last call, which starts them anew."""
        with self._lock:
            kept, self.kept = self.kept, Kept()
        return kept


def _rebuilt(c: float, site_c: dict[int, float], seed: int | None, counter: int) -> State:
    state = State(c, seed, counter)
    state.set_site_c(site_c)
    return state


_ids = count(1)
_states: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


def get_state(id: int) -> State | None:
    return _states.get(id)


@torch.library.custom_op("sus::draw", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def draw(like: Tensor, state: int, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
    """c of each site (float64 [sites]) and a fresh seed (0-dim int64) of a state, on the device of `like`."""
    found = _states.get(state)
    if found is None:
        raise RuntimeError("the SUSBackend that compiled this graph no longer exists; keep a reference to it")
    return found.draw(like.device, sites)


@draw.register_fake
def _(like: Tensor, state: int, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
    return like.new_empty((len(sites),), dtype=torch.float64), like.new_empty((), dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
    return None, None, None


draw.register_autograd(_backward, setup_context=_setup)
