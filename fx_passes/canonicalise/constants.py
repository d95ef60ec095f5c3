"""Values that no input can change, computed at compile time: masks made of arange and tril, and buffers under guard."""

from __future__ import annotations

import logging
import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from fx_passes.find.context import Context
from fx_passes.find.sizes import Sizes, number
from fx_passes.find.trace import Value
from fx_passes.ops.sharding import whole

log = logging.getLogger(__name__)
_LARGEST = 1 << 27  # elements of a mask that is worth a look


class Constants:
    """Computed values of one graph, and the placeholders of the buffers that each of them was computed from."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.buffers: dict[Value, frozenset[Node]] = {}
        self._known: dict[Any, dict[Value, Tensor | None]] = {}

    def evaluate(self, value: Value, sizes: Sizes | None = None) -> Tensor | None:
        """The value on the CPU, or None. With `sizes` symbolic numbers have those values, else none."""
        key = None if sizes is None else tuple(sizes.items())
        known = self._known.setdefault(key, {})
        if value not in known:
            known[value] = None
            try:
                known[value] = self._evaluate(value, sizes, known)
            except Exception:
                log.debug("cannot evaluate %s", value, exc_info=True)
        return known[value]

    def forget(self) -> None:
        """Drops what was computed at given sizes: layers share masks, and later calls have other sizes."""
        self._known = {None: self._known.get(None, {})}

    def _evaluate(self, value: Value, sizes: Sizes | None, known: dict[Value, Tensor | None]) -> Any:
        if value.op is None:
            return self._leaf(value)
        if isinstance(value.fake, Tensor) and math.prod(number(s, sizes) for s in value.fake.shape) > _LARGEST:
            return None
        if torch.Tag.nondeterministic_seeded in getattr(value.op, "tags", ()):
            return None
        inputs = [v for v in tree_leaves((value.args, value.kwargs)) if isinstance(v, Value)]
        for v in inputs:
            if self.evaluate(v, sizes) is None:
                return None
        self.buffers[value] = frozenset(n for v in inputs for n in self.buffers.get(v, ()))
        args, kwargs = tree_map(
            lambda x: known[x] if isinstance(x, Value) else number(x, sizes), (value.args, value.kwargs)
        )
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": None}
        if value.op is operator.getitem:
            return args[0][args[1]]
        with torch.no_grad():
            return value.op(*args, **{k: v for k, v in kwargs.items() if v is not None or k == "dtype"})

    def _leaf(self, value: Value) -> Tensor | None:
        constant = getattr(value.fake, "constant", None)
        if constant is not None and value.node is None:
            return constant.cpu()  # type: ignore[no-any-return]
        if value.node is None or value.version is not None or not isinstance(value.fake, Tensor):
            return None
        real = self.context.value(value.node)
        real = None if real is None or real.numel() > _LARGEST else whole(real.detach())
        if real is None:
            return None
        self.buffers[value] = frozenset([self.context.source(value.node)])
        return real.cpu()
