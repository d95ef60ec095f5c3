"""Module paths as `named_modules` has them, from what Dynamo calls them."""

from __future__ import annotations

import pytest

from fx_passes.find.source_location import module_path


@pytest.mark.parametrize(
    ("dynamo", "path"),
    [
        ("L['self']", ""),
        ("L['self'].layers.0.attn", "layers.0.attn"),
        ("L['self']._modules['blocks']._modules['0'].attn", "blocks.0.attn"),
        ("L['self'].blocks[3].attn", "blocks.3.attn"),
        ("L['args'][0].model.layers.0.self_attn", "model.layers.0.self_attn"),  # behind a decorator around forward
        ("L['fn']._orig_mod.attn", "attn"),
        ("L['self'].layers[1].forward.__self__._modules['attn']", "layers.1.attn"),  # a forward of its own
    ],
)
def test_module_path(dynamo: str, path: str) -> None:
    assert module_path(dynamo) == path
