"""Names and numbers of the attentions of one graph, and their way into the report."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from fx_passes.find.source_location import locate
from fx_passes.find.trace import Value
from fx_passes.report import REWRITTEN, Key, Report, Site
from fx_passes.rewrite.module_counts import Frame


@dataclass
class Sites:
    """The sites of one rewrite, by softmax: one softmax may enter several products, and is one site."""

    report: Report
    frame: Frame = field(default_factory=Frame)
    keys: list[Key] = field(default_factory=list)
    _known: dict[Value, Site] = field(default_factory=dict)
    _ordinals: dict[tuple[str, str], int] = field(default_factory=dict)

    def of(self, soft: Value) -> Site:
        if soft not in self._known:
            assert soft.home is not None
            module, source = locate(soft.home)
            ordinal = self._ordinals.get((module, source), 0)
            self._ordinals[module, source] = ordinal + 1
            site = Site(self.frame.named(module), source, ordinal)
            self._known[soft] = replace(site, number=self.report.number(self._stream(site)))
            self.report.add(self._known[soft])
            self.keys.append(site.key)
        return self._known[soft]

    def _stream(self, site: Site) -> Key:
        """What has a number of its own. Where modules share code, equal graphs make Inductor's caches hit."""
        owner = self.frame.owner
        if owner is None or not owner.shared:
            return site.key
        return f"{type(owner.module).__qualname__}: {self.frame.of('', site.module)}", site.source, site.ordinal

    def settle(self, soft: Value, status: str, reason: str, described: dict[str, Any]) -> bool:
        """Reports what became of a softmax; whether it is rewritten now and was not before."""
        if self.of(soft).status == REWRITTEN:
            return False
        if status != REWRITTEN:
            described = {**described, "tier": 0}
        self._known[soft] = replace(self._known[soft], status=status, reason=reason, **described)
        self.report.add(self._known[soft])
        return status == REWRITTEN
