"""Tells Inductor's caches which version of the pass made a graph. Imported where Inductor is: it takes seconds."""

from __future__ import annotations

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


class Version(CustomGraphPass):
    """A pass of Inductor that does nothing, with a uuid."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __call__(self, graph: Graph) -> None:
        pass

    def uuid(self) -> str:
        return self.version
