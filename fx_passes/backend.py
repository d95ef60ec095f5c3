"""SUSBackend: a torch.compile backend that rewrites attention and hands the graph to another compiler."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal, get_args

import torch
from torch.fx import GraphModule

from fx_passes.find.dynamo_patches import know_calls, mend_graph_breaks
from fx_passes.handle import Handle
from fx_passes.ops.arguments import check_choice
from fx_passes.ops.problem import Forward, Sampler
from fx_passes.report import Report
from fx_passes.rewrite import Options, rewrite_graph
from fx_passes.rewrite.guard import Guarded
from fx_passes.rewrite.module_counts import count_owners, first_parameter, this_frame
from fx_passes.state import shown

Compiler = Literal["inductor", "aot_eager", "eager"]
COMPILERS: tuple[str, ...] = get_args(Compiler)


class SUSBackend(Handle):
    """A backend for `torch.compile` in whose graphs attention has a SUS backward (arXiv 2505.15080).

    Graphs that are compiled where no gradient is recorded stay as they are. The attribute `report` is a `Report` on all
    graphs that it has compiled.

    Args:
        c: expected number of kept entries per query row and head, above 0; `float("inf")` is the exact backward.
            Setting `backend.c` acts from the next forward on and recompiles nothing.
        sampler: "auto" ("tile" on a GPU, else "systematic"), "systematic" (one draw per row), "independent" (one per
            entry, as in the paper) or "tile" (whole tiles of 64 rows and 64 keys).
        compiler: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        seed: fixes the draws; None follows `torch.manual_seed`.
        forward: "auto", or "library" to keep the bits of PyTorch's own attention kernel.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Examples:
        >>> import torch
        >>> import torch.nn.functional as F
        >>> backend = SUSBackend(c=8, compiler="eager")
        >>> attention = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend=backend)
        >>> q = torch.randn(1, 2, 64, 16, requires_grad=True)
        >>> attention(q, q, q).sum().backward()
        >>> backend.report.rewritten
        1
    """

    rewrites_attention = True  # Dynamo then traces calls and frames that it would not: see `find.dynamo_patches`

    def __init__(
        self,
        c: float = 30.0,
        sampler: Sampler = "auto",
        compiler: Compiler = "inductor",
        seed: int | None = None,
        forward: Forward = "auto",
    ) -> None:
        check_choice("compiler", compiler, COMPILERS)
        super().__init__(c, sampler, seed, forward)
        mend_graph_breaks()
        know_calls()
        self.compiler = compiler
        self.report = Report(slow=self.state.slow)
        # A graph for each module, so that each attention has a number, hence may have a c, of its own.
        self.apart = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Called by Dynamo for each graph. `kwargs` are torch.compile's `mode` and `options`, for Inductor."""
        know_calls()  # of packages that were loaded since, for the next frame
        if not torch.is_grad_enabled():
            return _compile(self.compiler, gm, example_inputs, kwargs)
        guarded, parameter, frame = Guarded(gm, example_inputs), first_parameter(gm), this_frame(gm, self.apart)
        options = Options(self.state, self.sampler, self.forward)
        result = rewrite_graph(gm, options, self.report, example_inputs, frame=frame)
        version = options.uuid() if result.rewritten else ""
        compiled = _compile(self.compiler, gm, example_inputs, kwargs, version)
        compiled = guarded.wrap(
            compiled, result, lambda original: _compile(self.compiler, original, example_inputs, kwargs)
        )
        return count_owners(compiled, self.report, result.sites, parameter, frame)

    def register(self, name: str) -> SUSBackend:
        """Makes it ``torch.compile(model, backend=name)``, for programs that take the name of a backend only.

        Returns:
            itself, whose `c` and `report` are those of the name. A name that another SUSBackend had is taken over.

        Raises:
            TypeError, ValueError: the name is no identifier, or is that of a backend which is not a SUSBackend.
        """
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, but it is {shown(name)}")
        if not name.isidentifier():
            raise ValueError(f"name must be an identifier such as 'sus64', but it is {shown(name)}")
        from torch._dynamo.backends import registry

        known = registry._COMPILER_FNS.get(name)
        if not isinstance(known, SUSBackend) and (known is not None or name in registry.list_backends(())):
            raise ValueError(f"name must be a new one, but torch.compile already has a backend {name!r}")
        registry._COMPILER_FNS.pop(name, None)
        registry.register_backend(self, name)
        return self

    def for_another_model(self) -> SUSBackend:
        """Another backend with the same options, c and number of draws, and an empty report."""
        backend = SUSBackend(self.c, self.sampler, self.compiler, self.state.seed, self.forward)
        backend.state.counter = self.state.counter
        return backend

    def separate_copy(self) -> SUSBackend:
        """Another backend with the same options, c, number of draws and report. `copy.deepcopy` gives the same one."""
        copy = SUSBackend.__new__(SUSBackend)
        copy.__setstate__(deepcopy(vars(self)))
        return copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another process, or as a copy in this one: the same options, c, seed and counter; nothing is compiled."""
        vars(self).update(state)
        mend_graph_breaks()
        know_calls()
        self.report.slow = self.state.slow
        self.report._owners.clear()  # identities of tensors of the process that it comes from

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


# What a program that knows the backend by its name only cannot pass otherwise.
_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "c": ("SUS_C", float),
    "sampler": ("SUS_SAMPLER", str),
    "compiler": ("SUS_COMPILER", str),
    "seed": ("SUS_SEED", int),
    "forward": ("SUS_FORWARD", str),
}


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (variable, read) in _VARIABLES.items():
        text = os.environ.get(variable, "").strip()
        if text:
            try:
                found[name] = read(text)
            except ValueError:
                kind = "a number above 0 or inf" if read is float else "an int"
                raise ValueError(f"the environment variable {variable} must be {kind}, but it is {text!r}") from None
    return found


_by_options: dict[tuple[Any, ...], SUSBackend] = {}


def sus(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, mode: str | None = None
) -> Callable[..., Any]:
    """The entry point behind ``torch.compile(model, backend="sus", options={"c": 30})``.

    Options are the arguments of `SUSBackend`; those that are not given come from the environment variables SUS_C,
    SUS_SAMPLER, SUS_COMPILER, SUS_SEED and SUS_FORWARD. Calls with equal options share one backend.
    """
    chosen = {**_from_environment(), **(options or {})}
    try:
        made = SUSBackend(**chosen)
    except (TypeError, ValueError) as error:
        names = [variable for name, (variable, _) in _VARIABLES.items() if name in chosen.keys() - (options or {})]
        given = f" (with {', '.join(names)} of the environment)" if names else ""
        raise type(error)(f"options of the backend 'sus'{given}: {error}") from None
    # By what was checked: among what was given, True is equal to 1, and a list has no hash.
    backend = _by_options.setdefault((made.c, made.sampler, made.compiler, made.state.seed, made.forward), made)
    return backend(gm, example_inputs, **({"mode": mode} if mode else {}))


sus.rewrites_attention = True  # type: ignore[attr-defined]
