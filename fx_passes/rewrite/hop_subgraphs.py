"""Bodies of higher-order operators such as activation checkpointing, and the draw that their calls share.

c of all sites and the seed are drawn in the outermost graph and handed into bodies as operands, so that a recomputation
sees the same numbers. They stand behind the inputs, one draw for each device.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fx_passes.find.context import Context, attribute, fake_of
from fx_passes.ops.sharding import is_dtensor
from fx_passes.state import State

_STEP = 0x9E3779B97F4A7C1  # between the seeds of calls that share one body

# Operators whose first argument is a body, with the number of arguments before the body's operands.
_BODIES = {"tag_activation_checkpoint": 1, "wrap": 1, "wrap_activation_checkpoint": 1, "invoke_subgraph": 2}


def subgraph_of(gm: GraphModule, node: Node) -> GraphModule | None:
    """The body that a node calls, if it is an operator whose body is entered."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if str(node.target.__name__) not in _BODIES or not node.args or not isinstance(node.args[0], Node):
        return None
    attr = node.args[0]
    body = attribute(gm, str(attr.target)) if attr.op == "get_attr" else None
    return body if isinstance(body, GraphModule) else None


def subgraphs(gm: GraphModule) -> Iterator[tuple[GraphModule, list[Node]]]:
    """Bodies of a graph, each with the nodes that call it."""
    calls: dict[GraphModule, list[Node]] = {}
    for node in gm.graph.nodes:
        body = subgraph_of(gm, node)
        if body is not None:
            calls.setdefault(body, []).append(node)
    yield from calls.items()


def operands(call: Node) -> tuple[Node, ...]:
    """What a call hands to its body's placeholders."""
    assert isinstance(call.target, torch._ops.HigherOrderOperator)
    return call.args[_BODIES[str(call.target.__name__)] :]  # type: ignore[return-value]


@dataclass
class Draws:
    """The nodes of c and seed, by graph and device, and the sites whose c the draw of a device returns."""

    state: State
    known: dict[tuple[Context, torch.device], tuple[Node, Node]] = field(default_factory=dict)
    sites: dict[torch.device, list[int]] = field(default_factory=dict)
    drawn: dict[torch.device, Node] = field(default_factory=dict)

    def get(
        self, context: Context, device: torch.device, before: Node, like: Node, sites: Sequence[int]
    ) -> tuple[Node, list[int], Node]:
        """The vector of c, the slots of these sites in it, and the seed, in front of a node of a graph.

        `like` is a node of the device there.
        """
        c, seed = self._nodes(context, device, before, like)
        all_ = self.sites.setdefault(device, [])
        all_ += [site for site in sites if site not in all_]
        drawn = self.drawn[device]
        drawn.args = (drawn.args[0], self.state.id, list(all_))
        return c, [all_.index(site) for site in sites], seed

    def prepare(self) -> None:
        """To be called when all sites are known."""
        for device, sites in self.sites.items():
            self.state.prepare(device, sites)

    def _nodes(self, context: Context, device: torch.device, before: Node, like: Node) -> tuple[Node, Node]:
        key = (context, device)
        if key not in self.known:
            self.known[key] = (
                self._lift(context, device) if context.calls else self._draw(context, device, before, like)
            )
        return self.known[key]

    def _draw(self, context: Context, device: torch.device, before: Node, like: Node) -> tuple[Node, Node]:
        graph = context.gm.graph
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        on_device = [n for n in placeholders if isinstance(fake_of(n), Tensor) and fake_of(n).device == device]
        if on_device:
            like, before = on_device[0], placeholders[-1].next
        with graph.inserting_before(before):
            if is_dtensor(fake_of(like)):  # the draw is this rank's own
                like = graph.call_function(torch.empty, ((0,),), {"device": device})
            both = self.drawn[device] = graph.call_function(torch.ops.sus.draw.default, (like, self.state.id, []))
            return graph.call_function(operator.getitem, (both, 0)), graph.call_function(operator.getitem, (both, 1))

    def _lift(self, context: Context, device: torch.device) -> tuple[Node, Node]:
        """Two more placeholders of a body, fed by all its calls."""
        assert context.parent is not None
        for i, call in enumerate(context.calls):
            c, seed = self._nodes(context.parent, device, call, call)
            if i:
                with call.graph.inserting_before(call):
                    seed = call.graph.call_function(operator.add, (seed, i * _STEP))
            call.args = (*call.args, c, seed)
        graph = context.gm.graph
        last = [n for n in graph.nodes if n.op == "placeholder"]
        spot = last[-1].next if last else next(iter(graph.nodes))
        with graph.inserting_before(spot):
            found = graph.placeholder("sus_c"), graph.placeholder("sus_seed")
        if context.parent.gm is not None:
            context.parent.gm.recompile()
        return found
