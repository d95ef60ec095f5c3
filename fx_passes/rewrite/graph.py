"""Rewrites one graph in place: puts the operator where an attention was proven, and reports every site."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fx_passes.canonicalise.attentions import Found, attentions
from fx_passes.canonicalise.axes import FailedMatch
from fx_passes.canonicalise.masks.lower import MaskGuard
from fx_passes.find.context import Context, fake_of
from fx_passes.find.relations import Relation
from fx_passes.find.trace import Trace, Value
from fx_passes.ops.problem import Forward, Sampler
from fx_passes.report import LEFT, REWRITTEN, Key, Report
from fx_passes.rewrite.build import Builder
from fx_passes.rewrite.emit import Emitter
from fx_passes.rewrite.hop_subgraphs import Draws, operands, subgraphs
from fx_passes.rewrite.layout import put_in_layout
from fx_passes.rewrite.module_counts import Frame
from fx_passes.rewrite.replace import end_of_views, other_results, remove_dead, replace, replace_lse
from fx_passes.rewrite.sharding import check_sharding
from fx_passes.rewrite.sites import Sites
from fx_passes.state import State

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What the rewritten calls are given. See `fx_passes.SUSBackend`."""

    state: State
    sampler: Sampler = "auto"
    forward: Forward = "auto"

    def uuid(self) -> str:
        """A hash of the pass's source and configuration, for compile caches."""
        return hashlib.sha256(repr((self.sampler, self.forward)).encode() + _source()).hexdigest()


@functools.cache
def _source() -> bytes:
    """A hash of this package's source."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.digest()


@dataclass
class Result:
    """What a rewrite did: how many softmaxes, all sites found, and what it relies on.

    `buffers` are placeholders whose values must stay; `claims` must hold at the sizes of each call, and `relations`
    between its inputs.
    """

    rewritten: int = 0
    sites: list[Key] = field(default_factory=list)
    buffers: set[Node] = field(default_factory=set)
    claims: list[MaskGuard] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)


@dataclass
class _Job:
    """What the graphs of one rewrite share."""

    options: Options
    sites: Sites
    draws: Draws
    result: Result
    dry: bool


def rewrite_graph(
    gm: GraphModule,
    options: Options,
    report: Report,
    example_inputs: Sequence[Any] | None = None,
    dry: bool = False,
    frame: Frame | None = None,
) -> Result:
    """Rewrites the attentions of a graph in place; `report` gets a site for each one found.

    Args:
        gm: a Dynamo graph, a graph of torch.export, or a plain one; the last needs `example_inputs`.
        options: what the calls are given.
        report: gets the sites.
        example_inputs: real inputs; buffers among them, and what is computed from symbolic sizes, may be proven to be
            masks: the caller then checks what `Result` says.
        dry: report what would be done, and do nothing.
        frame: where Dynamo's frame stands in the model.
    """
    sites = Sites(report, frame or Frame())
    job = _Job(options, sites, Draws(options.state), Result(sites=sites.keys), dry)
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    if not any(fake_of(n) is not None for n in gm.graph.nodes):
        FakeTensorProp(gm).propagate(*(example_inputs or ()))
    examples = dict(zip(placeholders, example_inputs or (), strict=False))
    _rewrite(Context(gm, examples), job)
    job.draws.prepare()
    return job.result


def _rewrite(context: Context, job: _Job) -> int:
    """Rewrites a graph and the bodies of its higher-order operators; returns how many softmaxes."""
    gm, trace = context.gm, Trace(context)
    done = 0
    for body, calls in subgraphs(gm):
        done += _rewrite(Context(body, parent=context, calls=tuple(calls), operands=operands(calls[0])), job)
    dead: list[Node] = []
    here = sum(_apply(trace, found, job, dead) for found in attentions(trace))
    if here + done and not job.dry:
        remove_dead(context, gm.graph, dead)
        gm.graph.lint()
        gm.recompile()
    job.result.rewritten += here
    return here + done


def _apply(trace: Trace, found: Found, job: _Job, dead: list[Node]) -> int:
    """Emits one attention and reports its sites; returns how many softmaxes were rewritten that had not been before.

    `dead` gets the nodes that it may leave without a reader.
    """
    numbers = [job.sites.of(soft).number for soft in found.softs]
    status, reason = LEFT, found.reason
    if found.walk is not None:
        try:
            check_sharding(found.lowered)
            if not job.dry:
                _emit(trace, found, numbers, job)
                job.result.buffers |= found.walk.buffers
                job.result.claims += found.walk.claims
                job.result.relations += found.walk.relations
                visited = [n for v in found.walk.visited for n in (v.node, v.home) if n in trace.context.position]
                dead += [*visited, *(user for n in visited for user in n.users if user.target is operator.getitem)]
            status = REWRITTEN
        except FailedMatch as why:
            reason = str(why)
        except Exception as error:
            log.debug("emitting %s failed", found.attention, exc_info=True)
            reason = f"the pass failed on it ({type(error).__name__}: {error})"
    return sum(job.sites.settle(soft, status, reason, found.describe(i)) for i, soft in enumerate(found.softs))


def _emit(trace: Trace, found: Found, numbers: list[int], job: _Job) -> None:
    """Puts new nodes in place of an attention, or leaves the graph as it was and raises."""
    assert found.attention is not None
    context, options = trace.context, job.options
    out = end_of_views(trace, found.attention.out)
    target = out.value
    before = target.node if target.node is not None else target.home
    assert before is not None
    attention = dataclasses.replace(found.attention, out=out)
    build = Builder(context, before)
    device = target.fake.device
    c, slots, seed = job.draws.get(context, device, before, build.node(attention.value.value), numbers)
    mark = list(context.gm.graph.nodes)  # the draw stays: other sites share it
    autocast = bool(context.state[before].autocast) or torch.is_autocast_enabled(device.type)
    shared = {"sampler": options.sampler, "forward": options.forward, "state": options.state.id}
    kept = [(v, v.node, v.version) for v in _values(trace)]
    try:
        c_of = dict(zip(numbers, slots, strict=True))
        emitter = Emitter(build, c, c_of, seed, shared, autocast)
        statistics = other_results(trace, found.softs[0])
        emitter.wants_lse = bool(statistics)
        new = put_in_layout(build, attention, emitter.emit(attention, found.lowered, numbers))
        replace(trace, build, target, new)
        if emitter.lse is not None:
            replace_lse(trace, build, found.softs[0], emitter.lse, statistics)
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
