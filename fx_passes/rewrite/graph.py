"""Rewrites one graph in place: finds attentions, understands them, emits the operator, reports every site."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fx_passes.canonicalise.axes import NotUnderstood
from fx_passes.canonicalise.constants import Constants
from fx_passes.canonicalise.forms import Attention, Walk
from fx_passes.canonicalise.understand import is_attention_softmax, understand, understand_sdpa
from fx_passes.find.anchors import SDPA, is_anchor, products, softmaxes
from fx_passes.find.context import Context, fake_of
from fx_passes.find.trace import Trace, Value
from fx_passes.find.where import locate
from fx_passes.report import LEFT, REWRITTEN, Key, Report, Site
from fx_passes.rewrite.bodies import Draws, bodies, operands
from fx_passes.rewrite.build import Builder
from fx_passes.rewrite.emit import Emitter, Ready, bias_is_dense, prepare
from fx_passes.rewrite.replace import end_of_views, is_live, remove_dead, replace
from fx_passes.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the rewritten calls are given. See `fx_passes.SUSBackend`."""

    state: State
    sampler: str = "systematic"
    forward: str = "auto"

    def uuid(self) -> str:
        """A hash of the pass's source and configuration, for compile caches."""
        digest = hashlib.sha256(repr((self.sampler, self.forward)).encode())
        root = Path(__file__).parent.parent
        for file in sorted(root.rglob("*.py")):
            digest.update(file.read_bytes())
        return digest.hexdigest()


@dataclass
class Found:
    """One attention of a graph: what is proven, or why it is left."""

    softs: list[Value]
    attention: Attention | None = None
    walk: Walk | None = None
    ready: list[Ready] = field(default_factory=list)
    reason: str = ""


@dataclass
class Result:
    """What a rewrite did: how many softmaxes, all sites found, and the placeholders whose values it relies on."""

    rewritten: int = 0
    sites: list[Key] = field(default_factory=list)
    buffers: set[Node] = field(default_factory=set)


@dataclass
class _Job:
    """What the graphs of one rewrite share."""

    options: Options
    report: Report
    result: Result = field(default_factory=Result)
    seen: dict[tuple[str, str], int] = field(default_factory=dict)
    sites: dict[Value, Site] = field(default_factory=dict)  # by softmax, which may enter several products
    dry: bool = False

    def __post_init__(self) -> None:
        self.draws = Draws(self.options.state)


def rewrite_graph(
    gm: GraphModule, options: Options, report: Report, example_inputs: Sequence[Any] | None = None, dry: bool = False
) -> Result:
    """Rewrites the attentions of a graph in place; `report` gets a site for each one found.

    Args:
        gm: a Dynamo graph, a graph of torch.export, or a plain one; the last needs `example_inputs`.
        options: what the calls are given.
        report: gets the sites.
        example_inputs: real inputs; buffers among them may be proven to be masks, see `Result.buffers`.
        dry: report what would be done, and do nothing.
    """
    job = _Job(options, report, dry=dry)
    places = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if not any(fake_of(n) is not None for n in gm.graph.nodes):
        FakeTensorProp(gm).propagate(*(example_inputs or ()))
    examples = dict(zip(places, example_inputs or (), strict=False))
    _rewrite(Context(gm, examples), job)
    job.draws.prepare()
    return job.result


def _rewrite(context: Context, job: _Job) -> int:
    gm = context.gm
    trace, constants = Trace(context), Constants(context)
    found: list[Found] = []
    done = 0
    for body, calls in bodies(gm):
        done += _rewrite(Context(body, parent=context, calls=tuple(calls), operands=operands(calls[0])), job)
    for node in list(gm.graph.nodes):
        if is_anchor(node):
            found += _at(trace, constants, node, found)
    dead: list[Node] = []
    here = sum(_apply(trace, item, job, dead) for item in found)
    if here + done and not job.dry:
        remove_dead(context, gm.graph, dead)
        gm.graph.lint()
        gm.recompile()
    job.result.rewritten += here
    return here + done


def _at(trace: Trace, constants: Constants, node: Node, before: list[Found]) -> list[Found]:
    """The attentions whose softmax is at a node, but for those already found from another softmax."""
    result: list[Found] = []
    for soft in softmaxes(trace, node):
        try:
            result += _of(trace, constants, soft, before + result)
        except Exception as error:
            log.debug("understanding %s failed", soft, exc_info=True)
            result.append(Found([soft], reason=f"the pass failed on it ({type(error).__name__}: {error})"))
    return result


def _of(trace: Trace, constants: Constants, soft: Value, before: list[Found]) -> list[Found]:
    if any(soft is s for f in before for s in f.softs):
        return []
    if soft.op is SDPA:
        return [_checked(trace, [soft], lambda: understand_sdpa(trace, constants, soft))]
    reasons: list[str] = []
    found: list[Found] = []
    for product in products(trace, soft):
        item = _checked(trace, [soft], lambda p=product: understand(trace, constants, p))
        if item.attention is not None:
            item.softs = [t.soft for t in item.attention.terms if not t.plain]
            found.append(item)
        else:
            reasons.append(item.reason)
    if found:
        return found
    others = [why for why in reasons if why != _PARAMETER]
    if (others or not reasons) and is_attention_softmax(Walk(trace, constants), soft):
        return [Found([soft], reason=others[0] if others else "its weights enter no product with value")]
    return []


_PARAMETER = "value is a parameter, not an activation"


def _checked(trace: Trace, softs: list[Value], attempt: Any) -> Found:
    try:
        attention, walk = attempt()
        ready = [prepare(walk, attention, term) for term in attention.terms if not term.plain]
        apart = {id(v) for v in attention.visited}
        for term in attention.terms:
            if term.dropout and term.shared_dropout is not None and is_live(trace, term.shared_dropout, apart):
                raise NotUnderstood("the weights after dropout are used elsewhere too")
        return Found(softs, attention, walk, ready)
    except NotUnderstood as why:
        return Found(softs, reason=str(why))


def _apply(trace: Trace, item: Found, job: _Job, dead: list[Node]) -> int:
    """Emits one attention and reports its sites; returns how many softmaxes were rewritten that had not been before."""
    sites = [_site(soft, job) for soft in item.softs]
    status, reason = LEFT, item.reason
    attention, walk = item.attention, item.walk
    if attention is not None and walk is not None:
        try:
            if not job.dry:
                _emit(trace, attention, item.ready, [s.number for s in sites], job)
                job.result.buffers |= walk.buffers
                dead += [n for v in walk.visited for n in (v.node, v.home) if n in trace.context.position]
            status = REWRITTEN
        except NotUnderstood as why:
            reason = str(why)
        except Exception as error:
            log.debug("emitting %s failed", attention, exc_info=True)
            reason = f"the pass failed on it ({type(error).__name__}: {error})"
    done = 0
    for soft, site, ready in zip(item.softs, sites, item.ready or [None] * len(sites), strict=False):  # type: ignore[list-item]
        if site.status == REWRITTEN:
            continue
        tier, mask, form = 0, "none", "sdpa" if item.softs[0].op is SDPA else "softmax"
        if ready is not None and attention is not None and walk is not None:
            tier = 2 if ready.tier == 2 or bias_is_dense(walk, ready) else 1
            mask, form = ready.plan.kind, attention.form
        tier = tier if status == REWRITTEN else 0
        known = dataclasses.replace(site, form=form, tier=tier, mask=mask, status=status, reason=reason)
        job.sites[soft] = known
        job.report.add(known)
        done += status == REWRITTEN
    return done


def _site(soft: Value, job: _Job) -> Site:
    assert soft.home is not None
    if soft in job.sites:
        return job.sites[soft]
    module, source = locate(soft.home)
    ordinal = job.seen.get((module, source), 0)
    job.seen[module, source] = ordinal + 1
    site = Site(module, source, ordinal)
    site = Site(module, source, ordinal, number=job.report.number(site.key))
    job.report.add(site)
    job.sites[soft] = site
    job.result.sites.append(site.key)
    return site


def _emit(trace: Trace, attention: Attention, ready: list[Ready], numbers: list[int], job: _Job) -> None:
    context, options = trace.context, job.options
    target, layout = end_of_views(trace, attention.out, attention.layout)
    before = target.node if target.node is not None else target.home
    assert before is not None
    attention = dataclasses.replace(attention, out=target, layout=layout)
    build = Builder(context, before)
    device = target.fake.device
    c, places, seed = job.draws.get(context, device, before, build.node(attention.value.value), numbers)
    mark = list(context.gm.graph.nodes)  # the draw stays: other sites share it
    autocast = bool(context.state[before].autocast) or torch.is_autocast_enabled(device.type)
    shared = {"sampler": options.sampler, "forward": options.forward, "state": options.state.id}
    kept = [(v, v.node, v.version) for v in _values(trace)]
    try:
        c_of = dict(zip(numbers, places, strict=True))
        new = Emitter(build, c, c_of, seed, shared, autocast).emit(attention, ready, numbers)
        replace(trace, build, target, new)
    except Exception:
        for v, node, version in kept:
            v.node, v.version = node, version
        _undo(context.gm, mark)
        raise


def _values(trace: Trace) -> list[Value]:
    return [v for r in trace.records.values() if r is not None for v in r.values]


def _undo(gm: GraphModule, mark: list[Node]) -> None:
    """Takes away the nodes that were inserted since `mark`."""
    old = set(mark)
    for node in reversed(list(gm.graph.nodes)):
        if node not in old and not node.users:
            gm.graph.erase_node(node)
