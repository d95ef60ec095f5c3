"""Times of forward and backward, in training steps and in probes, without waiting for the device in the loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Shapes = tuple[torch.Size, ...]


class Clock:
    """Moments on a device: events in its queue where it has one, else the host's clock.

    Args:
        device: where the work that is timed runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = getattr(torch.get_device_module(device), "Event", None) if device.type in _QUEUED else None
        self._device = device

    def now(self) -> Any:
        """This moment; on a GPU, that when all work given to the current stream so far is done. Never waits."""
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record(torch.get_device_module(self._device).current_stream(self._device))
        return event

    def seconds(self, start: Any, end: Any) -> float | None:
        """Between two moments; None where the device has not come that far yet. Never waits."""
        if self._event is None:
            return float(end - start)
        return float(start.elapsed_time(end)) / 1000 if end.query() else None


_QUEUED = {"cuda", "xpu"}


class StepTimes:
    """Seconds of forward and backward of the last training steps, with the c and the shapes that they had.

    The first step and those in which something was compiled are left out.

    Args:
        clock: of the module's device.
        keep: how many steps.
    """

    def __init__(self, clock: Clock, keep: int = 16) -> None:
        self._clock = clock
        self._begun: tuple[Any, float, Shapes] | None = None
        self._compiled = -1.0  # seconds of compilation when the step began
        self._first = True
        self._steps: deque[tuple[Any, Any, float, Shapes]] = deque(maxlen=keep)

    def start(self, c: float, batch: Any) -> None:
        self._compiled = compile_seconds()
        self._begun = self._clock.now(), c, shapes(batch)

    def stop(self) -> None:
        """After the backward; a second one of the same batch (as LBFGS has) counts nothing."""
        if self._begun is not None:
            start, c, of = self._begun
            now = compile_seconds()
            if not self._first and (now == self._compiled or math.isnan(now)):
                self._steps.append((start, self._clock.now(), c, of))
            self._begun, self._first = None, False

    def seconds(self, c: float, batch: Any) -> list[float]:
        """Of the steps with about this c and a batch of these shapes."""
        found, wanted = [], shapes(batch)
        for start, end, at, of in self._steps:
            if of == wanted and (at == c or abs(at - c) < 0.05 * c):
                seconds = self._clock.seconds(start, end)
                found += [] if seconds is None else [seconds]
        return found


class PassTimes:
    """Seconds of the passes of one probe, by name.

    Args:
        clock: of the module's device.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._moments: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock.now()
        yield
        self._moments.setdefault(name, []).append((start, self._clock.now()))

    def median(self, name: str, more: Sequence[float] = ()) -> tuple[float, int]:
        """Median and number of the passes of this name and `more` ones; NaN and 0 where there are none.

        To be asked when the device has finished them.
        """
        measured = [self._clock.seconds(*moments) for moments in self._moments.get(name, ())]
        seconds = [s for s in measured if s is not None] + list(more)
        return (median(seconds), len(seconds)) if seconds else (math.nan, 0)


def shapes(batch: Any) -> Shapes:
    """Of all tensors of a batch, in order."""
    return tuple(x.shape for x in tree_leaves(batch) if isinstance(x, Tensor))


def compile_seconds() -> float:
    """Wall time that torch.compile has spent in this process so far; NaN where torch does not say."""
    try:
        from torch._dynamo.utils import calculate_time_spent

        return float(calculate_time_spent()["total_wall_time"])
    except (ImportError, KeyError):
        return math.nan
