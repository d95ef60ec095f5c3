"""Checks of arguments of SUSBackprop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sus_lightning.schedules import check_count, observes, schedule_name

SPEEDUPS = ("step_speedup", "net_speedup")


def check_mode(mode: Any, compiler: str) -> str | None:
    if mode is None:
        return None
    allowed = list(torch._inductor.list_mode_options())
    if mode not in allowed:
        raise ValueError(f"mode must be None or one of {', '.join(map(repr, allowed))}, but it is {mode!r}")
    if compiler != "inductor":
        raise ValueError(f"mode is for compiler='inductor' only, but mode is {mode!r} and compiler is {compiler!r}")
    return str(mode)


def check_interval(every: Any, schedule: Callable[[int], float]) -> int:
    """Steps between probes; a schedule that adapts c needs some."""
    count = check_count("variance_every_n_steps", every)
    if observes(schedule) and not count:
        raise ValueError(
            f"variance_every_n_steps must be above 0 for c={schedule_name(schedule)}, which adapts c from the "
            f"probes, but it is 0; give c a number to train without probes"
        )
    return count


def check_modules(modules: Any) -> list[str] | str | None:
    if modules is None or (isinstance(modules, str) and modules == "attention"):
        return modules
    if isinstance(modules, str) or not isinstance(modules, Sequence) or not all(isinstance(m, str) for m in modules):
        raise TypeError(f"modules must be a list of names of submodules, 'attention' or None, but it is {modules!r}")
    if not modules:
        raise ValueError("modules must name at least one submodule, but it is empty")
    return list(modules)


def check_progress_bar(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"progress_bar must be a list of names or None, but it is {names!r}")
    for name in names:
        if name not in SPEEDUPS:
            raise ValueError(f"progress_bar may name 'step_speedup' and 'net_speedup', but it has {name!r}")
    return tuple(names)
