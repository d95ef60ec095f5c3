"""Activation checkpointing: a recomputation has the draws of the first computation, and is counted once."""

import math
import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint as module
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fx_passes import SUSBackend, recompute, sus_attention, sus_backward
from fx_passes.ops.functional import _default_state
from tests.passes.find import attention_packages


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def two(x: Tensor) -> Tensor:
    return attention(torch.sin(attention(x))) + 0


def inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 2, 48, 8, requires_grad=True)


def in_mode(loss: Tensor) -> None:
    """A backward that does not leave the modes around it, as those of torch's Python functions do."""
    options = {"allow_unreachable": True, "accumulate_grad": True}
    torch.autograd.Variable._execution_engine.run_backward((loss,), (torch.ones(()),), False, False, (), **options)


def saved_by_name(ctx, op, *args, **kwargs):  # type: ignore[no-untyped-def]
    return CheckpointPolicy.MUST_SAVE if "sus" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy):  # type: ignore[no-untyped-def]
    return partial(create_selective_checkpoint_contexts, policy)


FORMS = {
    "not reentrant": {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "without random state": {"use_reentrant": False, "preserve_rng_state": False},
    "reentrant, without random state": {"use_reentrant": True, "preserve_rng_state": False},
    "to the end": {"use_reentrant": False, "early_stop": False},
    "contexts": {"use_reentrant": False, "context_fn": lambda: (nullcontext(), nullcontext())},
    "attention saved": {"use_reentrant": False, "context_fn": selective([torch.ops.sus.attention.default])},
    "draws saved": {"use_reentrant": False, "context_fn": selective(saved_by_name)},
}


def nested(outer: bool, inner: bool):  # type: ignore[no-untyped-def]
    def form(f, x):  # type: ignore[no-untyped-def]
        return checkpoint(lambda x: checkpoint(f, x, use_reentrant=inner) * 1, x, use_reentrant=outer)

    return form


CALLS = {name: partial(lambda options, f, x: checkpoint(f, x, **options), given) for name, given in FORMS.items()}
CALLS |= {f"reentrant {a} in {b}": nested(b, a) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("where", ["inside", "engine", "after", "other"])
@pytest.mark.parametrize("form", CALLS)
def test_gradients_and_counts_are_those_without_checkpoint(form: str, where: str) -> None:
    found = []
    other = sus_backward(c=3)
    for call in (lambda f, x: f(x), CALLS[form]):
        x = inputs()
        with sus_backward(c=2) as sus:
            loss = call(two, x).sum()
            if where == "inside":
                loss.backward()
            elif where == "engine":
                in_mode(loss)
        if where == "after":
            loss.backward()
        elif where == "other":
            with other:
                in_mode(loss)
        found.append((x.grad, sus.calls, sus.state.counter, sus.state.kept.entries))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)  # type: ignore[arg-type]
    assert found[1][1:3] == (2, 2)
    assert found[0][3] == found[1][3] > 0
    assert other.calls == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_began_outside_of_a_block_stays_exact_in_one(reentrant: bool) -> None:
    x, exact = inputs(), inputs()
    attention(exact).sum().backward()
    loss = checkpoint(attention, x, use_reentrant=reentrant).sum()
    with sus_backward(c=2) as sus:
        in_mode(loss)
    assert sus.calls == 0
    assert torch.allclose(x.grad, exact.grad, atol=1e-6)  # type: ignore[arg-type]


class CheckpointInBackward(torch.autograd.Function):
    """Like a reversible layer: its backward runs the layer, under a checkpoint, and differentiates that."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return attention(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = checkpoint(two, x, use_reentrant=False)
        return torch.autograd.grad(y, x, grad)


def in_backward(x: Tensor) -> None:
    CheckpointInBackward.apply(x).sum().backward()  # type: ignore[no-untyped-call]


def in_backward_below_the_mode(x: Tensor) -> None:
    in_mode(CheckpointInBackward.apply(x).sum())  # type: ignore[no-untyped-call]


def without_torch_functions(x: Tensor) -> None:
    with torch._C.DisableTorchFunction():
        y = checkpoint(two, x, use_reentrant=False)
    y.sum().backward()


@pytest.mark.parametrize("run", [in_backward, in_backward_below_the_mode, without_torch_functions])
def test_what_began_where_the_mode_was_off(run) -> None:  # type: ignore[no-untyped-def]
    """There no call is ours: the recomputation must save the tensors that the first computation saved."""
    x, exact = inputs(), inputs()
    two(exact).sum().backward()
    with sus_backward(c=math.inf):
        run(x)
    assert torch.allclose(x.grad, exact.grad, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_inside_of_the_function(reentrant: bool) -> None:
    found = []
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        sus, x = sus_backward(c=2), inputs()

        def block(x: Tensor, sus: sus_backward = sus) -> Tensor:
            with sus:
                return two(x)

        with sus_backward(c=5) as around:
            call(block, x).sum().backward()
        assert (sus.calls, around.calls) == (2, 0)
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("reentrant", [True, False])
def test_sus_attention(reentrant: bool) -> None:
    def f(x: Tensor) -> Tensor:
        return sus_attention(x, x, x, c=2) + 0

    found = []
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        x = inputs()
        call(f, x).sum().backward()
        assert _default_state.counter == 1
        found.append(x.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [True, False])
def test_compiled(compiler: str, inside: bool) -> None:
    """A compiled region in a checkpointed function, and the reverse."""
    found = []
    for checkpointed in (False, True):
        torch._dynamo.reset()
        backend, x = SUSBackend(c=2, compiler=compiler), inputs()  # type: ignore[arg-type]
        call = partial(checkpoint, use_reentrant=False) if checkpointed else lambda f, x: f(x)
        if inside:
            out = torch.compile(lambda x, call=call: call(two, x), backend=backend)(x)
        else:
            out = call(torch.compile(two, backend=backend), x)
        out.sum().backward()
        assert backend.report.rewritten == 2
        assert backend.state.counter == 1
        found.append((x.grad, backend.state.kept.entries))
    assert torch.equal(found[0][0], found[1][0])  # type: ignore[arg-type]
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("reentrant", [True, False])
def test_two_backwards_draw_once(reentrant: bool) -> None:
    x = inputs()
    with sus_backward(c=2) as sus:
        loss = checkpoint(two, x, use_reentrant=reentrant).sum()
    loss.backward(retain_graph=True)
    first, x.grad = x.grad, None
    loss.backward()
    assert torch.equal(first, x.grad)  # type: ignore[arg-type]
    assert (sus.calls, sus.state.counter) == (2, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_another_c_in_between_acts_from_the_next_forward_on(reentrant: bool) -> None:
    found = []
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=False)):
        x = inputs()
        with sus_backward(c=2) as sus:
            loss = call(two, x).sum()
        sus.c = math.inf
        loss.backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_in_another_thread() -> None:
    x = inputs()
    with sus_backward(c=2) as sus:
        loss = checkpoint(two, x, use_reentrant=False).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    again = inputs()
    with sus_backward(c=2):
        two(again).sum().backward()
    assert torch.equal(x.grad, again.grad)  # type: ignore[arg-type]
    assert sus.calls == 2


def test_dropout_is_the_same() -> None:
    def f(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5) + 0

    found = []
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=False)):
        x = inputs()
        with sus_backward(c=math.inf):
            out = call(f, x)
        out.sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)


def test_many_recomputations_are_unbiased() -> None:
    x = inputs().detach().double().requires_grad_()
    exact = torch.autograd.grad(attention(x).square().sum(), x)[0]
    grads = []
    with sus_backward(c=2):
        for _ in range(300):
            loss = checkpoint(attention, x, use_reentrant=False).square().sum()
            grads.append(torch.autograd.grad(loss, x)[0])
    drawn = torch.stack(grads)
    error = (drawn.mean(0) - exact).norm() / (drawn.var(0).sum() / len(grads)).sqrt()
    assert 0.5 < error < 1.5


# torch's flex_attention refuses tensors that want a gradient on a CPU, also under no_grad, as reentrant ones run first.
@pytest.mark.parametrize(("name", "reentrant"), [("flash", True), ("flash", False), ("flex", False)])
def test_other_calls(name: str, reentrant: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def f(x: Tensor) -> Tensor:
        if name == "flex":
            return flex_attention(x, x, x) + 0
        q = x.transpose(1, 2)
        return sys.modules["flash_attn"].flash_attn_func(q, q, q, causal=True) + 0

    found = []
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        x = inputs()
        with attention_packages.installed():
            with sus_backward(c=2) as sus:
                out = call(f, x)
            out.sum().backward()
        assert sus.calls == 1, sus.report
        found.append(x.grad)
    assert torch.equal(*found)


def test_wrapped_modules() -> None:
    from torch.distributed._composable import checkpoint as composable
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    def layer() -> nn.Module:
        torch.manual_seed(1)
        return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)

    wrappers = [
        lambda m: m,
        composable,
        partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
        lambda m: lambda x: module.checkpoint_sequential(nn.Sequential(m), 1, x, use_reentrant=True),
    ]
    found = []
    for wrap in wrappers:
        wrapped = wrap(layer())
        torch.manual_seed(0)
        x = torch.randn(2, 32, 16, requires_grad=True)
        with sus_backward(c=2) as sus:
            out = wrapped(x)
        out.sum().backward()
        assert sus.calls == 1
        found.append(x.grad)
    for grad in found[1:]:
        assert torch.allclose(found[0], grad, atol=1e-6)  # type: ignore[arg-type]


def test_hooks_of_torch_stay_as_they_are() -> None:
    """An error in the function leaves nothing behind."""

    def f(x: Tensor) -> Tensor:
        two(x)
        raise KeyError

    for reentrant in (True, False):
        with sus_backward(c=2), pytest.raises(KeyError):
            checkpoint(f, inputs(), use_reentrant=reentrant)
    from fx_passes import recompute

    assert recompute._thread.runs == []
    assert recompute._thread.blocks == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    from fx_passes.huggingface import register_sus_attention

    found = []
    for checkpointed in (False, True):
        sus = register_sus_attention(c=2)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            use_cache=False, attn_implementation="sus",
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.randint(0, 20, (2, 24))
        model(input_ids=ids, labels=ids).loss.backward()
        assert (sus.calls, sus.state.counter) == (2, 2)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_torch_has_what_is_listened_to() -> None:
    """Without these names recomputations would draw anew, and no error would say so."""
    assert recompute.Stop is module._StopRecomputationError
    assert hasattr(module._checkpoint_hook, "__enter__")
    assert hasattr(module.CheckpointFunction, "forward")
