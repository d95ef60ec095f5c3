"""What changes from step to step: c, the counter of draws, and the counts of kept entries.

A compiled graph reads it through one operator per call, `sus::draw`, so that no number of it is ever a guard or a
constant of the graph: changing c recompiles nothing. On a GPU the state lies in a `DeviceState`, so that a captured
CUDA graph reads it too.

What is promised of draws. The seed of one is a 64-bit mix of

    torch.initial_seed(), the run, the rank or forked process, the number of the state in the run,
    the number of the device in the state, and how many draws the state has made on that device in the run.

A run lies between one `torch.manual_seed` and the next (see `fx_passes.runs`, also for `fork_rng`). States are numbered
in the order in which they first draw in a run, and counters only rise. Hence

1. within a run no two draws have the same numbers, whichever states draw, whenever they were made, on whatever ranks;
2. a program that calls `torch.manual_seed` and repeats itself draws the same numbers again: states, devices and draws
   are counted in the order of the program. (Threads that draw from one state share its numbers in the order in which
   they come.)
3. a state to which `resume` gave the counter and the number of a saved one goes on as that one would have.

A state with a `seed` of its own takes part in none of this: its draws are a function of seed, rank, device and counter.
Two of them with one seed draw the same.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fx_passes import runs
from fx_passes.device_state import DeviceState, mix
from fx_passes.recompute import remembered
from fx_passes.runs import Run

# Devices whose draws a graph may replay without Python.
_MIRRORED = {"cuda"}


def check_c(c: Any, name: str = "c") -> float:
    """c, a number or a 0-dim tensor, as a float; TypeError or ValueError if it is not above 0 (infinity is allowed)."""
    value = c.item() if isinstance(c, Tensor) and c.dim() == 0 and c.device.type != "meta" else c
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number above 0 or float('inf'), but it is {shown(c)}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float (float('inf') is allowed), but it is {shown(c)}") from None
    if math.isnan(number) or number <= 0:
        raise ValueError(f"{name} must be above 0 (float('inf') is the exact backward), but it is {number}")
    return number


def as_int(value: Any) -> int | None:
    """An int, or what stands for one, as NumPy's integers do; None for anything else, such as a bool or a tensor."""
    if isinstance(value, (bool, Tensor)):
        return None
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_seed(seed: Any, allowed: str = "an int or None") -> int | None:
    """A seed as `torch.manual_seed` takes it, or None; TypeError or ValueError otherwise."""
    if seed is None:
        return None
    number = as_int(seed)
    if number is None:
        raise TypeError(f"seed must be {allowed}, but it is {shown(seed)}")
    if not -(1 << 63) <= number < 1 << 64:
        raise ValueError(f"seed must be in [-2^63, 2^64), but it is {shown(seed)}")
    return number


def check_counter(counter: Any, name: str = "counter") -> int:
    """A number of draws, or of a state; TypeError or ValueError otherwise."""
    number = as_int(counter)
    if number is None:
        raise TypeError(f"{name} must be an int of at least 0, but it is {shown(counter)}")
    if not 0 <= number < 1 << 63:
        raise ValueError(f"{name} must be in [0, 2^63), but it is {shown(counter)}")
    return number


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, and short."""
    try:
        return reprlib.repr(value) if not isinstance(value, Tensor) else " ".join(repr(value).split())
    except Exception:  # of the value's own __repr__; integers of more than 4300 digits have none
        return f"a {type(value).__name__}"


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
        seed: fixes the draws; None follows `torch.manual_seed`.
        counter: number of draws so far.
        in_graphs: the state is that of compiled graphs, which hold its id.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Attributes:
        c: as above; setting it also takes back every c that single sites had.
        site_c: c of the sites that have their own.
        counter: number of draws so far in the run of the last one; on a GPU, reading it waits for the device, setting
            it does not. Setting it also takes over a new `torch.manual_seed`, which a captured CUDA graph cannot see by
            itself.
        kept: the counts since `pop_kept`; on a GPU, reading them waits for the device.
        slow: by site, why calls took the slower PyTorch path, and how many did for each reason.
        calls: how many calls of eager code got a SUS backward.
        left: why calls were left to the library's exact function, and how many were for each reason.
        by_form: both by a call's form, such as "sdpa" or "flash", and reason, which is "" where it was not left.
        id: the number by which operators find this state.
    """

    def __init__(self, c: float, seed: int | None = None, counter: int = 0, in_graphs: bool = False) -> None:
        self._in_graphs = in_graphs
        self.id = _new_id(self, in_graphs)
        self.seed = check_seed(seed)
        self._c, self._site_c = check_c(c), dict[int, float]()
        self._counter, self._kept = check_counter(counter), Kept()
        self.slow: dict[int, Counter[str]] = {}
        self.calls = 0
        self.left: Counter[str] = Counter()
        self.by_form: Counter[tuple[str, str]] = Counter()
        self._run: Run | None = None
        self._number: int | None = None
        self._places: weakref.WeakKeyDictionary[Run, _Place] = weakref.WeakKeyDictionary()  # in runs that were left
        self._on_devices: dict[torch.device, DeviceState] = {}
        self._numbers: dict[torch.device | None, int] = {}  # of the streams: None is the host's
        self._captured: dict[int, float] = {}  # by site, the largest c for which a captured graph has room
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is another state with the same c, seed and counter."""
        return _rebuilt, (self._c, self._site_c, self.seed, self.counter, self._in_graphs)

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
        sites = {check_counter(site, "a site's number"): c for site, c in values.items()}
        self._set_c(self._c, {**self._site_c, **{site: check_c(c, f"c of site {site}") for site, c in sites.items()}})

    def c_of(self, site: int) -> float:
        """c of a site: its own, or else the one of all."""
        return self._site_c.get(site, self._c)

    def _set_c(self, c: float, site_c: dict[int, float]) -> None:
        with self._lock:
            self._c, self._site_c = c, site_c
            for on_device in self._on_devices.values():
                on_device.write_c(c, site_c)
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
            return max([self._counter, *(on_device.counter for on_device in self._on_devices.values())])

    @counter.setter
    def counter(self, value: int) -> None:
        value = check_counter(value)
        with self._lock:
            self._follow()
            self._counter = value
            for on_device in self._on_devices.values():
                on_device.counter = value

    @property
    def position(self) -> tuple[int, int | None]:
        """Counter and number of this state in the run of now, for `resume`; the number is None before the first draw.

        On a GPU, reading it waits for the device.
        """
        with self._lock:
            self._enter(runs.current())
            return self.counter, self._number

    def resume(self, counter: int, number: int | None) -> None:
        """Goes on as the state would have whose `position` this was.

        Another live state that has this number in the run gets a new one.

        Raises:
            TypeError, ValueError: an argument is not allowed; the message names it, and nothing is changed.
        """
        counter = check_counter(counter)
        number = None if number is None else check_counter(number, "number")
        with self._lock:
            run = self._enter(runs.current())
            if number is not None and self.seed is None:
                run.claim(number, self)
                self._number = number
            self.counter = counter

    def _enter(self, run: Run) -> Run:
        """Takes up the place that this state has in a run: where it was, or the beginning of new draws."""
        if run is self._run or self.seed is not None:
            return run
        place = self._places.pop(run, None)
        if place is None:
            place = _Place(None, self._counter if self._run is None else 0, {})
        old = {
            device: on_device.exchange(place.counters.get(device, place.counter))
            for device, on_device in self._on_devices.items()
        }
        if self._run is not None:
            self._places[self._run] = _Place(self._number, self._counter, old)
        self._run, self._number, self._counter = run, place.number, place.counter
        return run

    def _follow(self) -> int:
        """The number that seeds all draws of this state in the run of now."""
        run = self._enter(runs.current())
        if self.seed is not None:
            base = self.seed
        else:
            if not run.has(self._number, self):
                self._number = run.next_number(self)
            assert self._number is not None
            base = run.mixed(self._number)
        for on_device in self._on_devices.values():
            on_device.follow(mix(base, (runs.rank() or 0) + (on_device.number << 32)))
        return base

    def _stream(self, device: torch.device | None) -> int:
        """The device that draws first has stream 0, so that one device draws the same whichever it is."""
        return self._numbers.setdefault(device, len(self._numbers))

    def next_seed(self) -> int:
        """A fresh seed. What is promised of it stands in the docstring of this module."""
        with self._lock:
            base = self._follow()
            self._counter += 1
            return mix(base, (runs.rank() or 0) + (self._stream(None) << 32), self._counter)

    def prepare(self, device: torch.device, sites: Sequence[int]) -> None:
        """Makes what draws for these sites need on a device, if it is one whose graphs may be captured."""
        with self._lock:
            if device.type in _MIRRORED:
                self._on_device(device).prepare(sites, self.c_of)

    def _on_device(self, device: torch.device) -> DeviceState:
        if device not in self._on_devices:
            counter = self.counter
            self._on_devices[device] = DeviceState(device, self._stream(device))
            self._on_devices[device].counter = counter
        return self._on_devices[device]

    def draw(self, device: torch.device, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
        """c of the sites (float64) and a fresh seed (0-dim int64) on the device, the same ones in a recomputation."""
        return remembered((self.id, device, *sites), lambda: self._draw(device, sites))

    def _draw(self, device: torch.device, sites: Sequence[int]) -> tuple[Tensor, Tensor]:
        if device.type not in _MIRRORED:
            c = torch.tensor([self.c_of(site) for site in sites], dtype=torch.float64, device=device)
            return c, torch.tensor(self.next_seed(), dtype=torch.int64, device=device)
        with self._lock:
            on_device = self._on_device(device)
            vector = on_device.prepare(sites, self.c_of)
            self._follow()
            return vector.clone(), on_device.next_seed()

    @property
    def kept(self) -> Kept:
        with self._lock:
            found = [vars(self._kept).values(), *(on_device.counts for on_device in self._on_devices.values())]
            return Kept(*(float(sum(x)) for x in zip(*found, strict=True)))

    @kept.setter
    def kept(self, value: Kept) -> None:
        with self._lock:
            self._kept = value
            for on_device in self._on_devices.values():
                on_device.clear_counts()

    def count(self, entries: float | Tensor, rows: float, dense: float, device: torch.device) -> None:
        """Adds to the counts what a backward on a device used; on a GPU nobody waits, and replays count too."""
        with self._lock:
            if device.type in _MIRRORED:
                self._on_device(device).count(entries, rows, dense)
                return
            self._kept.entries += float(entries)
            self._kept.rows += rows
            self._kept.dense += dense

    def note_slow(self, site: int, reason: str) -> None:
        """Counts a call of a site that took the PyTorch path."""
        remembered((self.id, site, reason), lambda: self._note_slow(site, reason))

    def _note_slow(self, site: int, reason: str) -> None:
        with self._lock:
            self.slow.setdefault(site, Counter())[reason] += 1

    def note_left(self, reason: str, form: str = "sdpa") -> None:
        """Counts a call that the library's exact function computes. (What Dynamo traces is not counted: see below.)"""
        if not torch.compiler.is_dynamo_compiling():
            remembered((self.id, form, reason), lambda: self._note(form, reason))

    def note_call(self, form: str = "sdpa") -> None:
        """Counts a call that gets a SUS backward. Dynamo would guard on the number, and compile for each anew."""
        if not torch.compiler.is_dynamo_compiling():
            remembered((self.id, form), lambda: self._note(form))

    def _note(self, form: str, reason: str = "") -> None:
        with self._lock:
            self.by_form[form, reason] += 1
            if reason:
                self.left[reason] += 1
            else:
                self.calls += 1

    def pop_kept(self) -> Kept:
        """The counts since the last call, which starts them anew."""
        with self._lock:
            kept, self.kept = self.kept, Kept()
        return kept


@dataclass(frozen=True)
class _Place:
    """Where a state was in a run that it left: its number, its counter, and the counters on devices."""

    number: int | None
    counter: int
    counters: dict[torch.device, Tensor]


def _rebuilt(c: float, site_c: dict[int, float], seed: int | None, counter: int, in_graphs: bool) -> State:
    state = State(c, seed, counter, in_graphs)
    state.set_site_c(site_c)
    return state


_ids = count(1 << 32)
_id_lock = threading.Lock()
_states: weakref.WeakValueDictionary[int, State] = weakref.WeakValueDictionary()


def _new_id(state: State, in_graphs: bool) -> int:
    """A number that no living state has; for graphs the smallest one.

    The graphs of the next fit are then those of the last one, and Inductor finds them in its cache.
    """
    with _id_lock:
        id = next(i for i in (count(1) if in_graphs else _ids) if i not in _states)
        _states[id] = state
        return id


def get_state(id: int) -> State | None:
    return _states.get(id)


def _in_child() -> None:
    """A lock that another thread holds at a fork is never released in the child."""
    global _id_lock
    _id_lock = threading.Lock()
    for state in list(_states.values()):
        state._lock = threading.RLock()


os.register_at_fork(after_in_child=_in_child)
