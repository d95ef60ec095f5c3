"""Finds attention that runs under no site: in methods that are not compiled, or in code that Dynamo does not enter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from fx_passes.rewrite.module_counts import module_of, runs_a_site

# What may stand between a softmax and its product with value, and gives weights again.
_THROUGH = {"_to_copy", "_unsafe_view", "add", "alias", "clone", "detach", "div", "expand", "masked_fill", "mul"}
_THROUGH |= {
    "native_dropout",
    "permute",
    "reshape",
    "select",
    "slice",
    "squeeze",
    "transpose",
    "unsqueeze",
    "view",
    "where",
}
_SOFTMAX = ("_softmax", "_safe_softmax")
_PRODUCTS = ("baddbmm", "bmm")


def watch() -> Unseen | None:
    """Begins to watch; None where Dynamo would compile nothing under a watch, as in older versions of torch."""
    if not hasattr(TorchDispatchMode, "ignore_compile_internals"):
        return None
    unseen = Unseen()
    unseen.__enter__()  # type: ignore[no-untyped-call]
    return unseen


class Unseen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the attentions that run in this thread outside of compiled graphs with sites.

    It changes no number and no decision of Dynamo. What is attention is read from the operators: PyTorch's own
    attention, and a softmax whose result enters a batched product as the left factor. Where no gradient flows, it is
    not counted.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found: dict[tuple[int, str], tuple[nn.Module | None, str]] = {}
        self._weights: dict[int, Tensor] = {}
        self._open = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not runs_a_site() and torch.is_grad_enabled():
            self._look(getattr(func, "__name__", str(func)).split(".")[0], args, result)
        return result

    def _look(self, name: str, args: Any, result: Any) -> None:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if name in _PRODUCTS:
            left = args[1] if name == "baddbmm" else first
            if left is not None and id(left) in self._weights:
                self._add()
        elif "scaled_dot_product" in name or name == "flex_attention":
            if any(isinstance(a, Tensor) and a.requires_grad for a in args[:3]):
                self._add()
        elif (name in _SOFTMAX and first is not None and first.requires_grad) or (
            name in _THROUGH and any(id(a) in self._weights for a in args)
        ):
            out = result[0] if isinstance(result, tuple) else result
            if isinstance(out, Tensor) and out.dim() > 1:
                self._weights[id(out)] = out  # held, so that its id is no other tensor's

    def _add(self) -> None:
        module, line = None, ""
        for frame in _frames():
            line = line or _line(frame)
            module = module_of(frame)
            if module is not None:
                break
        self._found.setdefault((id(module), line), (module, line))

    def names(self, root: nn.Module) -> list[str]:
        """The attentions seen, by the path of the module that ran each and its line; "" is `root`."""
        paths = {id(module): path.replace("._orig_mod", "") for path, module in root.named_modules()}
        found = []
        for module, line in self._found.values():
            path = paths.get(id(module)) or type(root if module is None else module).__name__
            found.append(f"{path} ({line})" if line else path)
        return found

    def is_below(self, root: nn.Module) -> bool:
        """Whether an attention was seen that a submodule of `root` ran."""
        return any(module is not None and module is not root for module, _ in self._found.values())

    def close(self) -> bool:
        """Ends the watch, if no other mode was left on top of it; whether it has ended."""
        if self._open and _get_current_dispatch_mode() is self:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._open = False
            self._weights.clear()
        return not self._open


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _line(frame: FrameType) -> str:
    """ "file.py:12" of a frame outside of torch, or ""."""
    file = frame.f_code.co_filename
    return "" if "/torch/" in file or file.startswith("<") else f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
