"""What the pass found: one `Site` per attention, and a `Report` that a person can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fx_passes.expect import Expectation

REWRITTEN = "rewritten"
LEFT = "left"

Key = tuple[str, str, int]


@dataclass(frozen=True)
class Site:
    """One softmax attention in a model.

    Attributes:
        module: path of the module that computes it, as in `named_modules`; "" for a plain function.
        source: "file.py:12" of the user's line, or "".
        ordinal: number among the attentions of one graph with the same module and source.
        form: how it is written, such as "sdpa" or "matmul-softmax-matmul".
        tier: 1, nothing M x N is left; 2, only softmax and the product with value are rewritten; 0, not rewritten.
        mask: the kind of mask that the rewritten call has, such as "causal" or "none"; "-" for calls in eager code,
            which are counted together.
        status: "rewritten" or "left".
        reason: why it was left, in words.
        number: index of the site in its backend: it separates the random streams of layers.
        modules: how many modules have run it. Above 1 where Dynamo compiled one graph for several layers, as it does
            for what follows a graph break, and their paths are not known: `module` is then the path below the code that
            they share.
    """

    module: str
    source: str
    ordinal: int = 0
    form: str = ""
    tier: int = 0
    mask: str = "none"
    status: str = LEFT
    reason: str = ""
    number: int = 0
    modules: int = 1

    @property
    def key(self) -> Key:
        return self.module, self.source, self.ordinal


@dataclass
class Report:
    """The sites of all graphs that a backend has compiled; a site that is compiled again counts once.

    `rewritten` and `left` count attentions: a site as many times as there are modules that have run it. Printed, it
    also says which sites had calls that no native or Triton kernel takes, and why: that is known once they have run.
    The attribute `expectation` is what to expect of SUS, an `Expectation`, in the report of `explain`; else None.
    """

    _sites: dict[Key, Site] = field(default_factory=dict)
    _numbers: dict[Key, int] = field(default_factory=dict)
    _owners: dict[Key, set[int]] = field(default_factory=dict)
    verb: str = "rewritten"
    slow: Mapping[int, Mapping[str, int]] = field(default_factory=dict)  # by site, as `State.slow`
    expectation: Expectation | None = None  # what to expect of SUS, from `explain`

    def number(self, key: Key) -> int:
        """The number of the site with this key: that of an earlier compilation, or the next free one."""
        return self._numbers.setdefault(key, len(self._numbers))

    def add(self, site: Site) -> None:
        self._sites[site.key] = replace(site, modules=max(1, len(self._owners.get(site.key, ()))))

    def ran(self, sites: Sequence[Key], owner: int | str, renamed: Callable[[str, str], str]) -> None:
        """A module has run the graph with these sites.

        It is known by its path, and `renamed` gives the path of a site's module below it; or by the identity of its
        first parameter only, and counts as one more module of the site.
        """
        for key in sites:
            site = self._sites[key]
            if isinstance(owner, int):
                self._owners.setdefault(key, set()).add(owner)
                self.add(site)
            else:
                there = replace(site, module=renamed(owner, site.module))
                self._sites.setdefault(there.key, there)

    @property
    def sites(self) -> list[Site]:
        """All attentions, rewritten and left."""
        return list(self._sites.values())

    @property
    def rewritten(self) -> int:
        """How many attentions have a SUS backward."""
        return sum(site.modules for site in self._sites.values() if site.status == REWRITTEN)

    @property
    def left(self) -> int:
        """How many attentions stay as they were."""
        return sum(site.modules for site in self._sites.values() if site.status == LEFT)

    def __str__(self) -> str:
        if not self._sites:
            return "No softmax attention was found."
        rows: list[tuple[str, ...]] = [("module", "source", "form", "tier", "mask", "status")]
        rows += [_row(site, self.slow.get(site.number, {})) for site in self._sites.values()]
        head = f"{self.rewritten} of {self.rewritten + self.left} attentions {self.verb}"
        expected = [] if self.expectation is None else [str(self.expectation)]
        return "\n".join([head, *_table(rows), *expected])


def _row(site: Site, slow: Mapping[str, int]) -> tuple[str, ...]:
    status = site.status if not site.reason else f"{site.status}: {site.reason}"
    status += f" (in {site.modules} modules)" if site.modules > 1 else ""
    if site.status == REWRITTEN and slow:
        status += " (PyTorch path: " + "; ".join(f"{reason}, {count} calls" for reason, count in slow.items()) + ")"
    return site.module or "-", site.source or "-", site.form, str(site.tier or "-"), site.mask, status


def _table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
