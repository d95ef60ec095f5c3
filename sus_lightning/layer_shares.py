"""Shares of c for each attention module, with the smallest sum of c at a given variance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sus_lightning.landscape import SLOPE
from sus_lightning.saved import Saved, check_name
from sus_lightning.schedules import check_amount, check_number


class LayerShares:
    """c_l / c of each attention module.

    The variance is the sum of what each module's draws add alone, ``a_l * c_l ** -p``, so that the smallest sum of c at
    a given variance has ``c_l ~ a_l ** (1 / (p + 1))``.

    Args:
        smoothing: weight of the last measurement of a module in its average.
    """

    def __init__(self, smoothing: float = 0.5) -> None:
        self.smoothing = smoothing
        self.alone: dict[str, float] = {}  # a_l over the batch variance
        self.shares: dict[str, float] = {}

    def of(self, module: str) -> float:
        return self.shares.get(module, 1.0)

    def next(self, modules: Sequence[str], probes: int) -> list[str]:
        """The modules that the next probe is to measure alone: new ones, or else the next in turn."""
        new = [module for module in modules if module not in self.alone]
        return new or list(modules[probes % len(modules) :][:1]) if modules else []

    def observe(self, measured: Mapping[str, tuple[float, float]]) -> float:
        """Takes (relative variance alone, its c) of some modules; returns the factor by which the whole changes."""
        for module, (variance, c) in measured.items():
            if math.isfinite(variance):
                alone, known = variance * c**SLOPE, self.alone.get(module)
                self.alone[module] = alone if known is None else known + self.smoothing * (alone - known)
        if not any(self.alone.values()):
            return 1.0
        least = max(self.alone.values()) * 1e-6  # a module that adds nothing still needs a c
        roots = {module: max(alone, least) ** (1 / (SLOPE + 1)) for module, alone in self.alone.items()}
        mean = sum(roots.values()) / len(roots)
        before, self.shares = self.shares, {module: root / mean for module, root in roots.items()}
        return self._whole(self.shares) / self._whole(before)

    def _whole(self, shares: Mapping[str, float]) -> float:
        return math.fsum(alone / shares.get(module, 1.0) ** SLOPE for module, alone in self.alone.items())

    def state_dict(self) -> dict[str, Any]:
        return {"alone": dict(self.alone), "shares": dict(self.shares)}

    def read(self, saved: Saved) -> LayerShares:
        """What `state_dict` had saved, checked, with this smoothing."""
        read = LayerShares(self.smoothing)
        read.alone = saved.read_dict("alone", check_name, check_amount, self.alone)
        read.shares = saved.read_dict("shares", check_name, partial(check_number, finite=True), self.shares)
        return read
