"""Where a node comes from: module path and source line."""

from __future__ import annotations

import re

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_OURS = ("fx_passes/rewrite/module_counts.py", "fx_passes/find/dynamo_patches.py")


def locate(node: Node) -> tuple[str, str]:
    """Module path as in `named_modules`, and "file.py:line" of the innermost user frame; "" for what is unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for value in stack.values():
        path = value[0]
    return module_path(path), source_of(node.stack_trace or "")


def module_path(dynamo: str) -> str:
    """``L['self']._modules['blocks']._modules['0'].attn`` as ``blocks.0.attn``."""
    # `L['args'][0]` is the module where Dynamo entered through a decorator around `forward`.
    path = re.sub(r"^L\['args'\]\[0\]|^L\['[A-Za-z_]\w*'\](\[\d+\](?=\._modules|$))?", "", dynamo)
    path = path.replace(".forward.__self__", "")  # where `forward` is an attribute of the instance
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"\['([^']*)'\]|\[(\d+)\]", lambda m: "." + (m.group(1) or m.group(2)), path)
    return path.removeprefix("._orig_mod").lstrip(".")


def source_of(trace: str) -> str:
    """The innermost user frame of a stack trace as text."""
    frames = _FRAME.findall(trace)
    frames = [f for f in frames if not f[0].endswith(_OURS)]
    outside = [f for f in frames if "/torch/" not in f[0]] or frames
    if not outside:
        return ""
    file, line = outside[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line}"
