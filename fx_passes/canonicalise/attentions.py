"""All attentions of a graph: each one proven and decided, or left with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from fx_passes.canonicalise.axes import FailedMatch
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.forms import Attention, Walk, arguments
from fx_passes.canonicalise.lower import LoweredTerm, bias_is_dense, lower
from fx_passes.canonicalise.match_attention import is_attention_softmax, match_attention, match_sdpa, products
from fx_passes.find import calls, flex
from fx_passes.find.anchors import SDPA, is_anchor, softmaxes
from fx_passes.find.context import fake_of
from fx_passes.find.trace import Trace, Value

log = logging.getLogger(__name__)
_PARAMETER = "value is a parameter, not an activation"


@dataclass
class Found:
    """One attention of a graph: what is proven, or why it is left."""

    softs: list[Value]
    attention: Attention | None = None
    walk: Walk | None = None
    lowered: list[LoweredTerm] = field(default_factory=list)
    reason: str = ""

    def describe(self, number: int) -> dict[str, Any]:
        """Form, tier and kind of mask of one of its softmaxes, for the report."""
        home = self.softs[0].home
        called = "" if home is None else calls.form_of(home)
        if self.attention is None or self.walk is None:
            return {"form": called or ("sdpa" if self.softs[0].op is SDPA else "softmax")}
        lowered = self.lowered[number]
        tier = 2 if lowered.tier == 2 or bias_is_dense(self.walk, lowered) else 1
        return {"form": called or self.attention.form, "tier": tier, "mask": lowered.mask.kind}


def attentions(trace: Trace) -> list[Found]:
    constants = Constants(trace.context)
    found: list[Found] = []
    for node in list(trace.context.gm.graph.nodes):
        if calls.is_call(node):
            found += _call(trace, constants, node)
        elif node.target is calls.call_left:
            found.append(Found([_whole(node)], reason=str(node.args[2])))
        elif is_anchor(node):
            for soft in softmaxes(trace, node):
                try:
                    found += _of(trace, constants, soft, found)
                except Exception as error:
                    log.debug("understanding %s failed", soft, exc_info=True)
                    found.append(Found([soft], reason=f"the pass failed on it ({type(error).__name__}: {error})"))
    constants.forget()
    return found


def _whole(node: Node) -> Value:
    """A call as one value, for the report."""
    return Value(None, (), {}, fake_of(node), home=node)


def _call(trace: Trace, constants: Constants, node: Node) -> list[Found]:
    """The attention that a call is as a whole."""
    reason = flex.why_left(trace.context, node) if flex.is_flex(node) else ""
    if reason or trace.record(node) is None:
        why = trace.failures.get(node)
        spoken = isinstance(why, (flex.NotPointwise, calls.NotTaken))
        failed = str(why).split("\n")[0] if spoken else f"the pass failed on it ({type(why).__name__}: {why})"
        return [Found([_whole(node)], reason=reason or failed)]
    for user in node.users:
        trace.own(user)
    found = [f for soft in softmaxes(trace, node) for f in _of(trace, constants, soft, [])]
    for item in found:
        if item.walk is not None and node in trace.context.relations:
            item.walk.relations.append(trace.context.relations[node])
    return found or [Found([_whole(node)], reason="no softmax of a product was found in it")]


def _of(trace: Trace, constants: Constants, soft: Value, before: list[Found]) -> list[Found]:
    """The attentions that a softmax is in, but for those already found from another one."""
    known = [s for f in before for s in f.softs]
    if any(soft is s for s in known):
        return []
    if soft.op is SDPA:
        return [_proven(trace, constants, soft, match_sdpa, soft)]
    entered, ends = products(trace, soft)
    tried = [_proven(trace, constants, soft, match_attention, product) for product in entered]
    found = [f for f in tried if f.attention is not None]
    if found:
        return [f for f in found if not any(s is t for s in known for t in f.softs)]
    others = [f.reason for f in tried if f.reason != _PARAMETER]
    if (others or not tried) and is_attention_softmax(Walk(trace, constants), soft):
        through = f" (they go through {', '.join(ends)})" if ends else ""
        return [
            Found([soft], reason=others[0] if others else f"its probabilities enter no product with value{through}")
        ]
    return []


def _is_read(trace: Trace, attention: Attention, dropped: Value) -> bool:
    """Whether what the rewritten attention reads is made of the probabilities after dropout, such as their row sum."""
    position, first = trace.context.position, _place(trace, dropped)
    factors = (f.value for term in (*attention.terms, *attention.plain) for f in term.factors)
    todo, seen = [attention.value.value, *factors], set[Value]()
    while todo:
        value = todo.pop()
        if value is dropped:
            return True
        if value not in seen and (_place(trace, value) >= first or value.home not in position):
            seen.add(value)
            todo += arguments(value)
    return False


def _place(trace: Trace, value: Value) -> int:
    """The position of the node that computes a value; of inputs and constants -1."""
    node = value.home if value.home is not None else value.node
    return -1 if node is None else trace.context.position.get(node, -1)


def _proven(
    trace: Trace, constants: Constants, soft: Value, match: Callable[[Walk, Value], Attention], value: Value
) -> Found:
    walk = Walk(trace, constants)
    try:
        attention = match(walk, value)
        lowered = [lower(walk, attention, term) for term in attention.terms]
        apart = {id(v) for v in walk.visited}
        for term in attention.terms:
            dropped = None if term.dropout is None else term.dropout.value
            if dropped is not None and (trace.is_live(dropped, apart) or _is_read(trace, attention, dropped)):
                raise FailedMatch("the probabilities after dropout are used elsewhere too")
        return Found([t.softmax.value for t in attention.terms], attention, walk, lowered)
    except FailedMatch as why:
        return Found([soft], reason=str(why))
