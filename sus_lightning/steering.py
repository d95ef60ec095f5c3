"""What a schedule asks of a probe, and c of the sites that have their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fx_passes.report import REWRITTEN, Report
from sus_lightning.schedules import Schedule

Step = Callable[[int], float]


def per_layer(schedule: Step) -> bool:
    """Whether each attention module has a c of its own."""
    return isinstance(schedule, Schedule) and schedule.per == "layer"


def attention_modules(schedule: Step, report: Report) -> dict[str, list[int]]:
    """Numbers of the sites of each attention module, where the schedule gives each its own c; else none."""
    sites: dict[str, list[int]] = {}
    if per_layer(schedule):
        for site in report.sites:
            if site.status == REWRITTEN:
                sites.setdefault(site.module or f"site {site.number}", []).append(site.number)
    return sites


def measured_alone(schedule: Step, modules: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """`alone` of the next probe."""
    if not isinstance(schedule, Schedule):
        return {}
    return {name: modules[name] for name in schedule.measure(list(modules))}


def measured_at(schedule: Step, modules: Mapping[str, list[int]]) -> dict[float, dict[int, float]]:
    """`at` of the next probe."""
    if not isinstance(schedule, Schedule):
        return {}
    return {
        c: {number: schedule.c_of(name, c) for name, numbers in modules.items() for number in numbers}
        for c in schedule.measure_at()
    }


def site_c(schedule: Step, modules: Mapping[str, list[int]]) -> dict[int, float]:
    """c by number of the site."""
    if not isinstance(schedule, Schedule):
        return {}
    return {number: schedule.c_of(name) for name, numbers in modules.items() for number in numbers}
