"""Which modules run a compiled graph: after a graph break several layers may share one.

Dynamo hands the parameters of a layer to its graph as inputs, and one graph then serves every layer of the same code.
The first parameter of a call tells the layers apart; all of them would count a layer twice whose recompilation for
other inputs reads one parameter more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from fx_passes.find.context import is_parameter
from fx_passes.report import Key, Report

_MOST = 4096  # modules that are told apart: `functional_call` may bring new parameters in every step


def first_parameter(gm: GraphModule) -> int | None:
    """The position of a graph's first parameter among its inputs, or None."""
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return next((i for i, n in enumerate(places) if is_parameter(n)), None)


def count_owners(
    compiled: Callable[..., Any], report: Report, sites: Sequence[Key], parameter: int | None
) -> Callable[..., Any]:
    """`compiled`, which tells the report of each module that it has not yet run in."""
    if not sites or parameter is None:
        return compiled
    seen: set[int] = set()

    def counted(*args: Any) -> Any:
        owner = id(args[parameter])
        if owner not in seen and len(seen) < _MOST:
            seen.add(owner)
            report.ran(sites, owner)
        return compiled(*args)

    return counted
