"""Whether a value is still read."""

from __future__ import annotations

import operator

from fx_passes.find.trace import Trace, Value


def is_live(trace: Trace, value: Value, apart: set[int]) -> bool:
    """Whether a value is read by something else than the values `apart`, up to an output of its graph."""
    nodes = [] if value.node is None else [value.node]
    if value.home is not None and value.home is not value.node:
        record = trace.records.get(value.home)
        if record is not None and isinstance(record.out, (tuple, list)):
            nodes += [u for u in value.home.users if u.target is operator.getitem and record.out[u.args[1]] is value]  # type: ignore[index]
    for node in nodes:
        for user in node.users:
            record = trace.record(user) if user in trace.context.position else None
            if record is None:
                return True
    return any(id(u) not in apart and is_live(trace, u, apart) for u in trace.users(value))
