"""What `SUSBackend`, `sus_backward` and `register_sus_attention` have in common: c, options, and what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from fx_passes.ops.arguments import check_choice
from fx_passes.ops.problem import FORWARDS, SAMPLERS, Forward, Sampler
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

    _in_graphs: ClassVar[bool] = True

    def __init__(
        self, c: float = 30.0, sampler: Sampler = "auto", seed: int | None = None, forward: Forward = "auto"
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("forward", forward, FORWARDS)
        self.state = State(c, seed, in_graphs=self._in_graphs)
        self.sampler, self.forward = sampler, forward

    @property
    def c(self) -> float:
        """Expected number of kept entries per query row and head; setting it acts from the next forward on."""
        return self.state.c

    @c.setter
    def c(self, value: float) -> None:
        self.state.c = value


class CallHandle(Handle):
    """The handle of single calls, which no compiled graph shows: `state` counts them."""

    _in_graphs = False

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
        """A site for the calls of each form that got a SUS backward, and one for each reason why calls did not."""
        report = Report(slow=self.state.slow)
        kinds = sorted(self.state.by_form.items(), key=lambda kind: bool(kind[0][1]))  # those that were left come last
        for number, ((form, reason), count) in enumerate(kinds):
            where = Site("", f"{count} calls", number, form, mask="-", reason=reason, number=number)
            report.add(where if reason else replace(where, tier=1, status=REWRITTEN))
        return report
