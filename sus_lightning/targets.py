"""Which submodules of a LightningModule are compiled."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from torchmetrics import Metric

from fx_passes.torch_compat import signature

LEAST_BLOCKS = 4  # so many equal blocks take more than twice as long to compile as one

_MAY_ATTEND: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_OWN = vars(nn.Module()).keys()  # what nn.Module keeps for itself
_LISTS = (nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Target:
    """A submodule to compile, and its path; `is_block` where it shares its graphs with blocks equal to it."""

    path: str
    module: nn.Module
    is_block: bool = False


def targets(root: nn.Module, modules: Sequence[str] | str | None, blocks: bool) -> Iterator[Target]:
    """Submodules to compile: those that are named; for "attention" the blocks that repeat; for None the children.

    With `blocks`, a child that is a stack of equal blocks gives its blocks instead. That is a guess at where all
    attention is, and what it needs: see `is_stack`.

    Raises:
        ValueError: a name in `modules` that `root` does not have.
    """
    if modules == "attention":
        yield from _blocks(root, "")
    elif modules is not None:
        for name in modules:
            try:
                yield Target(name, root.get_submodule(name))
            except AttributeError:
                known = ", ".join(repr(n) for n, _ in root.named_children())
                raise ValueError(
                    f"modules must name submodules of {type(root).__name__} (its children are {known}), "
                    f"but it has {name!r}"
                ) from None
    else:
        yield from _children(root, "", blocks)
        yield from _unregistered(root)


def _children(parent: nn.Module, prefix: str, blocks: bool) -> Iterator[Target]:
    if blocks and isinstance(parent, _LISTS) and is_stack(parent):
        yield from _blocks(parent, prefix)
        return
    for name, child in parent.named_children():
        if isinstance(child, _LISTS):
            yield from _children(child, f"{prefix}{name}.", blocks)
        elif blocks and is_stack(child):
            yield from _blocks(child, f"{prefix}{name}.")
        elif may_attend(child):
            yield Target(prefix + name, child)


def _unregistered(root: nn.Module) -> Iterator[Target]:
    """Modules in plain lists, tuples and dicts of `root`, which are no submodules and are called all the same."""
    registered = set(root.modules())
    for name, value in vars(root).items():
        if name in _OWN or not isinstance(value, (list, tuple, dict)):
            continue
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, nn.Module) and item not in registered and may_attend(item):
                yield Target(f"{name}.{key}", item)


def is_stack(module: nn.Module) -> bool:
    """Whether a module has blocks that repeat, which one graph can serve as well as a graph of the whole module.

    They are of one class, with parameters of the same shapes, and take one argument: a mask that is made outside of a
    block is not seen in its graph, and could then not be told from any other tensor.
    """
    stacks = [list(m.children()) for m in module.modules() if isinstance(m, (*_LISTS, nn.Sequential))]
    repeated = [
        [child for child in stack if sum(type(o) is type(child) for o in stack) > 1 and may_attend(child)]
        for stack in stacks
    ]
    outermost = [
        r for r in repeated if r and not any(r[0] is not o and r[0] in set(o.modules()) for q in repeated for o in q)
    ]
    equal = all(len({kind_of(block) for block in blocks}) == 1 for blocks in outermost)
    enough = max(map(len, outermost), default=0) >= LEAST_BLOCKS
    return (
        enough
        and equal
        and all(_takes_one_argument(block) for blocks in outermost for block in blocks)
        and not any(is_compiled(m) for m in module.modules())
    )


def kind_of(module: nn.Module) -> Hashable:
    """Equal for modules of one class whose parameters have the same names and shapes."""
    return type(module), tuple((name, p.shape) for name, p in module.named_parameters())


def _takes_one_argument(module: nn.Module) -> bool:
    parameters = list(signature(module.forward).parameters.values())
    return len(parameters) == 1 and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def _blocks(parent: nn.Module, prefix: str) -> Iterator[Target]:
    """The outermost blocks that repeat below a module, and what may hold attention beside them."""
    for name, child in parent.named_children():
        if not may_attend(child) and not isinstance(child, _LISTS):
            continue
        repeats = isinstance(parent, (*_LISTS, nn.Sequential)) and _repeats(parent, child)
        inside = isinstance(child, _LISTS) or (not repeats and _has_blocks(child))
        if inside:
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield Target(prefix + name, child, is_block=True)


def _repeats(parent: nn.Module, child: nn.Module) -> bool:
    return sum(type(other) is type(child) for other in parent.children()) > 1


def _has_blocks(module: nn.Module) -> bool:
    lists = (m for m in module.modules() if isinstance(m, (*_LISTS, nn.Sequential)))
    return any(_repeats(m, child) and may_attend(child) for m in lists for child in m.children())


def may_attend(module: nn.Module) -> bool:
    """Whether a call of the module may compute attention: torch's own layers, such as losses and norms, do not."""
    if isinstance(module, (*_LISTS, nn.ParameterList, nn.ParameterDict, Metric)):
        return False  # not called
    if isinstance(module, torch.jit.ScriptModule):
        return False  # Dynamo does not enter it
    if type(module).__module__.startswith(("torch.nn.modules.", "torch.ao.", "torch.nn.parallel.")):
        return isinstance(module, _MAY_ATTEND) or any(may_attend(m) for m in module.modules() if m is not module)
    return True


def is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
