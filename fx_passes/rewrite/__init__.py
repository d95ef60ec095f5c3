"""Puts SUS operators in place of the attentions that were found and understood."""

from fx_passes.rewrite.graph import Options, rewrite_graph

__all__ = ["Options", "rewrite_graph"]
