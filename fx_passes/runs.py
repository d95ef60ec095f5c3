"""Runs: where draws start anew, and where they must not.

SUS takes its numbers from no generator of torch, so that dropout, initialisation and data order stay what they are
without it. What generators say about a program it learns by listening: `torch.manual_seed`, `torch.seed`,
`torch.get_rng_state` and `torch.set_rng_state` do what they did, and tell this module. A *run* is what lies between:

- `torch.manual_seed(s)` begins a run. Two runs with the same s draw the same numbers: a program repeats itself.
- The end of `torch.random.fork_rng`, and any other `set_rng_state` of a state that `get_rng_state` gave earlier, goes
  back to the run of then, which continues where it was: no draw comes again.
- `torch.manual_seed(s)` inside of `fork_rng` begins a run of that block: its draws are others than those outside, and
  than those of every other such block of the outer run. A second call in the same block starts the block's run anew.
- A process made by `os.fork` continues with draws of its own, until it calls `torch.manual_seed`.

Within a run each `State` has a number, given in the order in which states first draw. The promise, with what `State`
adds, is in its docstring.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from fx_passes.device_state import mix


class Run:
    """The draws between one `torch.manual_seed` and the next.

    Args:
        seed: what it was given; None for the draws before the first call, which follow `torch.initial_seed()`.
        block: 0, or a number that identifies the `fork_rng` block in which it began.

    Attributes:
        forks: `fork_rng` blocks and processes that were forked off so far.
        process: 0, or a number that identifies the forked process in which the run continues.
    """

    def __init__(self, seed: int | None, block: int = 0) -> None:
        self.seed, self.block, self.process, self.forks = seed, block, 0, 0
        self._next = 0
        self._states: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def next_number(self, state: Any) -> int:
        """The next free number of a state."""
        with _lock:
            number, self._next = self._next, self._next + 1
            self._states[number] = state
            return number

    def claim(self, number: int, state: Any) -> None:
        """Gives a state the number that it had in the process which saved it; nobody else has it any more."""
        with _lock:
            self._states[number] = state
            self._next = max(self._next, number + 1)

    def has(self, number: int | None, state: Any) -> bool:
        """Whether this is the number of a state."""
        return number is not None and self._states.get(number) is state

    def mixed(self, number: int) -> int:
        """What seeds the draws of the state with a number, at the seed that the generator has now."""
        base = torch.initial_seed()
        seed = base if self.seed is None else self.seed
        # Where processes have ranks these tell them apart, however they were started.
        return mix(base, seed, self.block, 0 if rank() is not None else self.process, number)


def rank() -> int | None:
    """The rank of this process; None where there are no ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    given = os.environ.get("RANK", "")
    return int(given) if given.isascii() and given.isdigit() else None


_MOST = 1024  # generator states of which the run is remembered

_lock = threading.RLock()
_current = Run(None)
_seen: dict[bytes, Run] = {}  # by the contents of a generator's state: copies of it are as good
_blocks: list[
    tuple[int, int, Run]
] = []  # of each open fork_rng: id of the state that it holds, its number, run outside


def current() -> Run:
    return _current


_seed_devices, _get, _set = torch.random._seed_custom_device, torch.random.get_rng_state, torch.random.set_rng_state
_FORK_RNG = torch.random.fork_rng.__wrapped__.__code__  # type: ignore[attr-defined]


def _seed_custom_device(seed: int) -> None:
    """That of torch.random, which `manual_seed` and `seed` call under whatever name they were imported."""
    global _current
    _seed_devices(seed)
    with _lock:
        _current = Run(int(seed), _blocks[-1][1] if _blocks else 0)


def get_rng_state() -> Tensor:
    state = _get()
    with _lock:
        contents = _contents(state)
        _seen.pop(contents, None)
        _seen[contents] = _current
        if len(_seen) > _MOST:
            del _seen[next(iter(_seen))]
        if sys._getframe(1).f_code is _FORK_RNG:
            _current.forks += 1
            outer = (_current.seed or 0, _current.block, _current.process)
            _blocks.append((id(state), mix(*outer, _current.forks), _current))
    return state


def set_rng_state(new_state: Tensor) -> None:
    global _current
    _set(new_state)
    with _lock:
        _current = _seen.get(_contents(new_state), _current)
        if sys._getframe(1).f_code is _FORK_RNG:
            for block in [b for b in _blocks if b[0] == id(new_state)]:
                _blocks.remove(block)
                _current = block[2]


def _contents(state: Tensor) -> bytes:
    state = state.contiguous()
    return hashlib.blake2b(ctypes.string_at(state.data_ptr(), state.numel()), digest_size=16).digest()


def _listen() -> None:
    torch.random._seed_custom_device = _seed_custom_device
    for ours, its in ((get_rng_state, _get), (set_rng_state, _set)):
        ours.__doc__ = its.__doc__
        setattr(torch, its.__name__, ours)
        setattr(torch.random, its.__name__, ours)


def _before_fork() -> None:
    _current.forks += 1


def _in_child() -> None:
    """A lock that another thread holds at the fork is never released in the child."""
    global _lock
    _lock = threading.RLock()
    _current.process = mix(_current.process, _current.forks)


_listen()
os.register_at_fork(before=_before_fork, after_in_child=_in_child)
