"""What `SUSBackend`, `sus_backward` and `register_sus_attention` have in common: c, options, and what was found."""

from __future__ import annotations

from fx_passes.ops.arguments import check_choice
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.report import REWRITTEN, Report, Site
from fx_passes.state import State


class Handle:
    """c and the options of a SUS backward. How attention gets it is what the classes that inherit from it do.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
        sampler: as for `SUSBackend`.
        seed: as for `SUSBackend`.
        forward: as for `SUSBackend`.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Attributes:
        state: c, also that of single sites; the random counter, and the counts of kept entries.
    """

    def __init__(self, c: float = 30.0, sampler: str = "auto", seed: int | None = None, forward: str = "auto") -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("forward", forward, FORWARDS)
        self.state = State(c, seed)
        self.sampler, self.forward = sampler, forward

    @property
    def c(self) -> float:
        """Setting it acts from the next forward on and recompiles nothing."""
        return self.state.c

    @c.setter
    def c(self, value: float) -> None:
        self.state.c = value


class CallHandle(Handle):
    """The handle of single calls, which no compiled graph shows: `state` counts them."""

    @property
    def calls(self) -> int:
        """How many calls got a SUS backward; what `torch.compile` traces is not counted."""
        return self.state.calls

    @property
    def left(self) -> dict[str, int]:
        """How many calls went to their own function, by reason."""
        return self.state.left

    @property
    def report(self) -> Report:
        """The calls that got a SUS backward as one site, and one site for each reason for which calls did not."""
        report = Report(state=self.state.id)
        if self.calls:
            report.add(Site("", f"{self.calls} calls", form="sdpa", tier=1, status=REWRITTEN))
        for number, (reason, count) in enumerate(self.left.items(), 1):
            report.add(Site("", f"{count} calls", number, form="sdpa", reason=reason, number=number))
        return report
