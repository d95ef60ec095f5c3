"""`explain`: where a model's attentions are, what the pass would rewrite, and why it would leave the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule

from fx_passes.expect import expect
from fx_passes.find.dynamo_patches import know_calls, mend_graph_breaks
from fx_passes.report import Report
from fx_passes.rewrite import Options, rewrite_graph
from fx_passes.rewrite.module_counts import count_owners, first_parameter, this_frame
from fx_passes.state import State, shown


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Finds the attentions of a model without rewriting any.

    The model runs three times, forward, on the given arguments: through Dynamo, where modules keep what they were
    compiled with, and twice without gradients, to count operations and to time. Printed, the report also says what to
    expect of SUS: attention's share of a training step, and speed-ups predicted from attention timed on this device;
    `Report.expectation` has them for any c.

    Args:
        model: an nn.Module or a function.
        *args: positional arguments of one call.
        **kwargs: its named arguments.

    Raises:
        TypeError: the model is not callable.

    Returns:
        A `Report`; ``print(explain(model, *args))`` shows a table.

    Examples:
        >>> import torch
        >>> def attention(q, k, v):
        ...     return torch.softmax(q @ k.mT / 4, -1) @ v
        >>> x = torch.randn(2, 8, 16, requires_grad=True)
        >>> explain(attention, x, x, x).rewritten
        1
    """
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function, but it is {shown(model)}")
    mend_graph_breaks()
    know_calls()
    report = Report(verb="would be rewritten")
    options = Options(State(float("inf")))

    def look(gm: GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        if not torch.is_grad_enabled():
            return gm
        frame, parameter = this_frame(gm), first_parameter(gm)
        found = rewrite_graph(gm, options, report, example_inputs, dry=True, frame=frame)
        return count_owners(gm, report, found.sites, parameter, frame)

    look.rewrites_attention, look.report = True, report  # type: ignore[attr-defined]
    torch._dynamo.reset()  # what was compiled earlier would not be seen
    run = model.forward if isinstance(model, torch.nn.Module) else model
    with torch.enable_grad():
        torch.compile(run, backend=look, dynamic=False)(*args, **kwargs)
    torch._dynamo.reset()
    report.expectation = expect(model, args, kwargs)
    return report
