"""SUSBackend: a torch.compile backend that rewrites attention and hands the graph to another compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from fx_passes.find.breaks import know_calls, mend_graph_breaks
from fx_passes.ops.functional import check_choice
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.report import Report
from fx_passes.rewrite import Options, rewrite_graph
from fx_passes.rewrite.guard import Guarded
from fx_passes.rewrite.owners import count_owners, first_parameter
from fx_passes.state import State

COMPILERS = ("inductor", "aot_eager", "eager")


class SUSBackend:
    """A backend for `torch.compile` in whose graphs attention has a SUS backward (arXiv 2505.15080).

    Graphs that are compiled where no gradient is recorded stay as they are.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
            Setting `backend.c` acts from the next forward on and recompiles nothing.
        sampler: "systematic" (one draw per row), "independent" (one per entry, as in the paper) or "block" (64 rows
            share their keys, and c counts keys per block; not the paper's).
        compiler: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        seed: fixes the draws; None follows `torch.manual_seed`.
        forward: "auto", or "library" to keep the bits of PyTorch's own attention kernel.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    >>> import torch
    >>> import torch.nn.functional as F
    >>> backend = SUSBackend(c=8, compiler="eager")
    >>> attention = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend=backend)
    >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
    >>> attention(q, q, q).sum().backward()
    >>> backend.report.rewritten
    1
    """

    def __init__(
        self,
        c: float = 30.0,
        sampler: str = "systematic",
        compiler: str = "inductor",
        seed: int | None = None,
        forward: str = "auto",
    ) -> None:
        check_choice("sampler", sampler, SAMPLERS)
        check_choice("compiler", compiler, COMPILERS)
        check_choice("forward", forward, FORWARDS)
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise TypeError(f"seed must be an int or None, but it is {seed!r}")
        mend_graph_breaks()
        know_calls()
        self.sampler, self.compiler, self.forward = sampler, compiler, forward
        self.state = State(c, seed)
        self.report = Report(state=self.state.id)

    rewrites_attention = True  # read by find.breaks while Dynamo traces

    @property
    def c(self) -> float:
        return self.state.c

    @c.setter
    def c(self, value: float) -> None:
        self.state.c = value

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Called by Dynamo for each graph. `kwargs` are torch.compile's `mode` and `options`, for Inductor."""
        know_calls()  # of packages that were loaded since, for the next frame
        if not torch.is_grad_enabled():
            return _compile(self.compiler, gm, example_inputs, kwargs)
        guarded, parameter = Guarded(gm, example_inputs), first_parameter(gm)
        options = Options(self.state, self.sampler, self.forward)
        result = rewrite_graph(gm, options, self.report, example_inputs)
        version = options.uuid() if result.rewritten else ""
        compiled = _compile(self.compiler, gm, example_inputs, kwargs, version)
        compiled = guarded.wrap(
            compiled, result, lambda original: _compile(self.compiler, original, example_inputs, kwargs)
        )
        return count_owners(compiled, self.report, result.sites, parameter)

    def __deepcopy__(self, memo: dict[int, Any]) -> SUSBackend:
        """Itself: it is the handle of the graphs that it compiled. Lightning copies torch.compile's arguments."""
        return self

    def __repr__(self) -> str:
        return f"SUSBackend(c={self.c:g}, sampler={self.sampler!r}, compiler={self.compiler!r})"


def _compile(
    compiler: str, gm: GraphModule, example_inputs: Sequence[Any], kwargs: dict[str, Any], version: str = ""
) -> Callable[..., Any]:
    if compiler == "inductor":
        from torch._inductor import config, list_mode_options
        from torch._inductor.compile_fx import compile_fx

        from fx_passes.rewrite.version import Version

        mode = kwargs.get("mode")
        patches = {**(list_mode_options(mode) if mode else {}), **(kwargs.get("options") or {})}
        if version and config.post_grad_custom_pre_pass is None:
            patches.setdefault("post_grad_custom_pre_pass", Version(version))
        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches or None)
    else:
        compiled = torch._dynamo.lookup_backend(compiler)(gm, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


_by_options: dict[tuple[tuple[str, Any], ...], SUSBackend] = {}


def sus(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The entry point behind ``torch.compile(model, backend="sus", options={"c": 30})``.

    Options are the arguments of `SUSBackend`; calls with equal options share one backend.
    """
    key = tuple(sorted((options or {}).items()))
    if key not in _by_options:
        try:
            _by_options[key] = SUSBackend(**(options or {}))
        except TypeError as error:
            raise TypeError(f"options of the backend 'sus': {error}") from None
    return _by_options[key](gm, example_inputs, **({"mode": mode} if mode else {}))


sus.rewrites_attention = True  # type: ignore[attr-defined]
