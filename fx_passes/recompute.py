"""Recomputation under activation checkpointing draws, and counts, what the first computation did.

`torch.utils.checkpoint` runs a function a second time in the backward, maybe in another thread, and outside of the
blocks of `sus_backward` that were around it. This module listens to its two forms, as `fx_passes.runs` does to
`manual_seed`: they do what they did, and what is drawn and counted below them is remembered and given again, in its
order. A `Region` remembers also which `sus_backward` was in force where it began; another one, or none, is not heard
in its place.

Regions nest. Where a recomputation calls what the first computation did not, as a function that looks at the time
would, that is drawn and counted anew.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils import checkpoint

T = TypeVar("T")


class _NeverRaised(Exception):
    pass


# Raised, where all is computed that a backward needs, through whatever runs below a recomputation.
Stop: type[Exception] = getattr(checkpoint, "_StopRecomputationError", _NeverRaised)


class Block(Protocol):
    """A `sus_backward`."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *args: Any) -> Any: ...

    def call(self, key: str, given: dict[str, Any]) -> Any:
        """A call that `eager_calls` sees, by its name and arguments."""


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.blocks: list[Block] = []  # the last one is in force
        self.runs: list[_Run] = []  # of regions, from the outermost to the innermost


_thread = _ThisThread()


class Region:
    """What a checkpointed function drew and counted when it ran first."""

    def __init__(self) -> None:
        self.block = in_force()
        self.found: dict[Hashable, list[Any]] = {}

    @contextmanager
    def first(self) -> Iterator[None]:
        """Around the first computation."""
        run = _Run(self)
        _thread.runs.append(run)
        try:
            yield
        finally:
            _thread.runs.remove(run)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Around a recomputation."""
        outside, _thread.blocks = _thread.blocks, []
        try:
            with self.first():
                if self.block is None:
                    yield
                else:
                    with self.block:
                        yield
        finally:
            _thread.blocks = outside


class _Run:
    """One computation of a region: how far it has come."""

    def __init__(self, region: Region) -> None:
        self._found, self._places = region.found, Counter[Hashable]()

    def recall(self, key: Hashable, make: Callable[[], T]) -> T:
        known, place = self._found.setdefault(key, []), self._places[key]
        if place == len(known):
            known.append(make())
        self._places[key] = place + 1
        found: T = known[place]
        return found


def in_force() -> Block | None:
    """`block()`, but where its mode is off, as in the backward of a custom function: then None."""
    found = block()
    stack: Any = _get_current_function_mode_stack
    modes = stack() if torch._C._is_torch_function_enabled() else ()
    return found if any(mode is found for mode in modes) else None


def block() -> Block | None:
    """The `sus_backward` that is in force in this thread."""
    return _thread.blocks[-1] if _thread.blocks else None


def enter(block: Block) -> None:
    _thread.blocks.append(block)


def leave() -> None:
    _thread.blocks.pop()


def remembered(key: Hashable, make: Callable[[], T]) -> T:
    """`make()`; in a recomputation, what it was when the region ran first."""
    return _recall(len(_thread.runs), key, make)


def _recall(depth: int, key: Hashable, make: Callable[[], T]) -> T:
    """From the innermost of `depth` regions; what that does not know, those around it may."""
    return make() if not depth else _thread.runs[depth - 1].recall(key, lambda: _recall(depth - 1, key, make))


_ATTRIBUTE = "_sus_region"  # of torch's frame of a checkpointed region


def _listen() -> None:
    hook: Any = getattr(checkpoint, "_checkpoint_hook", None)
    function: Any = getattr(checkpoint, "CheckpointFunction", None)
    if hook is None or function is None:  # a torch that is not known yet: recomputations draw anew
        return
    init, enters, exits, forward = hook.__init__, hook.__enter__, hook.__exit__, function.forward

    def __init__(self: Any, frame: Any) -> None:
        self._sus_first = None
        if not hasattr(frame, _ATTRIBUTE):
            region, recompute_fn = Region(), frame.recompute_fn

            def again(*args: Any, **kwargs: Any) -> Any:
                with region.again():
                    return recompute_fn(*args, **kwargs)

            frame.recompute_fn, self._sus_first = again, region.first()
            setattr(frame, _ATTRIBUTE, region)
        init(self, frame)

    def __enter__(self: Any) -> Any:
        result = enters(self)
        if self._sus_first is not None:
            self._sus_first.__enter__()
        return result

    def __exit__(self: Any, *args: Any) -> Any:
        if self._sus_first is not None:
            self._sus_first.__exit__(None, None, None)
        return exits(self, *args)

    def forward_reentrant(ctx: Any, run_function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        region, started = Region(), False

        def run(*args: Any) -> Any:
            nonlocal started
            around, started = region.again() if started else region.first(), True
            with around:
                return run_function(*args)

        return forward(ctx, run, preserve_rng_state, *args)

    hook.__init__, hook.__enter__, hook.__exit__ = __init__, __enter__, __exit__
    function.forward = staticmethod(forward_reentrant)


_listen()
