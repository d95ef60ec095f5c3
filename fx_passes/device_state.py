"""The state on one device: what a captured CUDA graph reads and writes when it is replayed and no Python runs.

c, the counter and the counts lie in tensors that keep their addresses. Whoever sets c writes into them in place; a draw
counts and mixes on the device, so that each replay draws anew and obeys the c that was set last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_WORD = (1 << 64) - 1
_GOLDEN, _A, _B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(number: int) -> int:
    """The signed 64-bit number that is equal modulo 2^64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def mix(*numbers: int) -> int:
    """A well-mixed signed 64-bit number of the given ones (SplitMix64's finaliser, chained)."""
    h = 0
    for number in numbers:
        h = (h + (number & _WORD) + _GOLDEN) & _WORD
        h = ((h ^ (h >> 30)) * _A) & _WORD
        h = ((h ^ (h >> 27)) * _B) & _WORD
        h ^= h >> 31
    return signed(h)


def mix_last(before: Tensor, number: Tensor) -> Tensor:
    """``mix(*numbers, number)`` for ``before = mix(*numbers)``, both int64, 0-dim, on any device."""
    h = before + number + signed(_GOLDEN)
    h = (h ^ _shifted(h, 30)) * signed(_A)
    h = (h ^ _shifted(h, 27)) * signed(_B)
    return h ^ _shifted(h, 31)


def _shifted(h: Tensor, by: int) -> Tensor:
    """A logical shift to the right; that of int64 fills with the sign."""
    return (h >> by) & ((1 << (64 - by)) - 1)


def capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class DeviceState:
    """c, counter and counts of one `State` on one device.

    Streams may share a device: each waits for what the one before it did here. What a captured graph does when it is
    replayed no Python sees: a replay on another stream than the eager draws beside it must be ordered by its user.

    Args:
        device: where.
        number: tells the streams of a state's devices apart; 0 has the host's own.
    """

    def __init__(self, device: torch.device, number: int) -> None:
        if capturing(device):
            raise RuntimeError("run the step once before it is captured in a CUDA graph: the state must exist outside")
        self.device, self.number = device, number
        with _real():
            self._counter = torch.zeros((), dtype=torch.int64, device=device)
            self._before = torch.zeros((), dtype=torch.int64, device=device)  # mix of all but the counter
            self._kept = torch.zeros(3, dtype=torch.float64, device=device)
        self._c: dict[tuple[int, ...], Tensor] = {}
        self._drawn_from: int | None = None
        self._stream: torch.cuda.Stream | None = None  # that used these tensors last

    def prepare(self, sites: Sequence[int], c_of: Callable[[int], float]) -> Tensor:
        """The vector of c for these sites, which must be made before a graph that reads it is captured."""
        key = tuple(sites)
        if key not in self._c:
            if capturing(self.device):
                raise RuntimeError("run the step once before it is captured in a CUDA graph: a site is new")
            with _real():
                self._c[key] = torch.tensor([c_of(s) for s in key], dtype=torch.float64, device=self.device)
        self._order()
        return self._c[key]

    def _order(self) -> None:
        """Work of this stream on the state comes after that of the stream that used it last."""
        if self.device.type != "cuda" or capturing(self.device):
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def write_c(self, c: float, site_c: Mapping[int, float]) -> None:
        self._order()
        with _real():
            for sites, vector in self._c.items():
                vector.fill_(c)  # unlike a copy from the host it waits for nothing
                for i, site in enumerate(sites):
                    if site in site_c:
                        vector[i].fill_(site_c[site])

    def follow(self, before: int) -> None:
        """Draws come from ``mix(base, stream) = before`` from now on."""
        if before != self._drawn_from:
            if capturing(self.device):
                raise RuntimeError("the seed was changed before a capture: run the step once more, then capture it")
            self._order()
            with _real():
                self._before.fill_(before)
            self._drawn_from = before

    def exchange(self, counter: int | Tensor) -> Tensor:
        """Puts another counter in; returns the one that was there, on the device. Nobody waits."""
        if capturing(self.device):
            raise RuntimeError("the seed was changed before a capture: run the step once more, then capture it")
        self._order()
        with _real():
            old = self._counter.clone()
            self._counter.copy_(counter) if isinstance(counter, Tensor) else self._counter.fill_(counter)
        return old

    def next_seed(self) -> Tensor:
        self._order()
        with torch.no_grad():
            return mix_last(self._before, self._counter.add_(1))

    @property
    def counter(self) -> int:
        self._order()
        return int(self._counter)

    @counter.setter
    def counter(self, value: int) -> None:
        self._order()
        with _real():
            self._counter.fill_(value)

    def count(self, *numbers: float | Tensor) -> None:
        self._order()
        with torch.no_grad():
            for i, number in enumerate(numbers):
                self._kept[i].add_(number)

    @property
    def counts(self) -> list[float]:
        self._order()
        found: list[float] = self._kept.tolist()
        return found

    def clear_counts(self) -> None:
        self._order()
        with _real():
            self._kept.zero_()


@contextmanager
def _real() -> Iterator[None]:
    """Tensors of the state are plain ones, whatever mode its user is in: a fake or inference tensor would not do."""
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        yield
