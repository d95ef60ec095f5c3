"""Rewrites one graph in place: every site that `find` offers and `canonicalise` understands."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from fx_passes.find.sdpa import sdpa_arguments
from fx_passes.find.where import locate
from fx_passes.ops.functional import attend
from fx_passes.report import REWRITTEN, Report, Site
from fx_passes.state import State


@dataclass(frozen=True)
class Options:
    """What the rewritten calls are given. See `fx_passes.SUSBackend`."""

    state: State
    sampler: str = "systematic"
    forward: str = "auto"


def rewrite_graph(gm: GraphModule, options: Options, report: Report) -> int:
    """Rewrites the attentions of a Dynamo graph in place; returns how many. `report` gets a site for each one found."""
    done = 0
    seen: dict[tuple[str, str], int] = {}
    state: tuple[Node, Node] | None = None
    for node in list(gm.graph.nodes):
        arguments = sdpa_arguments(node)
        if arguments is None:
            continue
        module, source = locate(node)
        ordinal = seen.get((module, source), 0)
        seen[module, source] = ordinal + 1
        site = Site(module, source, ordinal, form="sdpa", tier=1)
        site = replace(site, number=report.number(site.key), status=REWRITTEN, mask=arguments.mask_kind)
        if state is None:
            state = _insert_draw(node, arguments.query, options.state)
        with gm.graph.inserting_before(node):
            new = gm.graph.call_function(
                attend,
                (arguments.query, arguments.key, arguments.value, *state),
                {
                    **arguments.options,
                    "sampler": options.sampler,
                    "forward": options.forward,
                    "site": site.number,
                    "state": options.state.id,
                },
            )
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        report.add(site)
        done += 1
    if done:
        gm.graph.lint()
        gm.recompile()
    return done


def _insert_draw(before: Node, like: Node, state: State) -> tuple[Node, Node]:
    """The node pair (c, seed) of one draw in front of a node."""
    graph = before.graph
    with graph.inserting_before(before):
        both = graph.call_function(torch.ops.sus.draw.default, (like, state.id))
        return graph.call_function(operator.getitem, (both, 0)), graph.call_function(operator.getitem, (both, 1))
