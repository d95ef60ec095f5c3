"""torch.func, forward-mode AD and gradients of gradients: exact results, or one error that names SUS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fx_passes import SUSBackend, sus_attention, sus_backward
from fx_passes.ops.exact import exact_attention
from fx_passes.ops.functional import attend
from fx_passes.ops.reference.dense import Dense, dense_attention
from tests.ops.cases import CASES

torch.manual_seed(0)
Q, K, V = (torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(3))
BATCH = torch.randn(3, *Q.shape, dtype=torch.float64)
MASK = torch.randn(5, 5, dtype=torch.float64)


def by_hand(query: Tensor, *masks: Tensor) -> Tensor:
    logits = query @ K.mT / 2
    return torch.softmax(logits + masks[0] if masks else logits, -1) @ V


def scalar(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).sin().sum()


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "jvp": lambda f: jvp(f, (Q,), (BATCH[0],)),
    "grad": lambda f: grad(scalar(f))(Q),
    "grad of grad": lambda f: grad(lambda x: grad(scalar(f))(x).sin().sum())(Q),
    "jacrev": lambda f: jacrev(f)(Q),
    "jacfwd": lambda f: jacfwd(f)(Q),
    "hessian": lambda f: hessian(scalar(f))(Q),
    "vmap": lambda f: vmap(f)(BATCH),
    "vmap(grad)": lambda f: vmap(grad(scalar(f)))(BATCH),
    "vmap(jvp)": lambda f: vmap(lambda x: jvp(f, (x,), (x,))[1])(BATCH),
    "dual numbers": lambda f: _dual(f, Q),
    "dual numbers that require a gradient": lambda f: _dual(f, Q.clone().requires_grad_()),
    "grad by a mask": lambda f: grad(scalar(lambda m: f(Q, m)))(MASK),
    "jvp by a mask": lambda f: jvp(lambda m: f(Q, m), (MASK,), (MASK,)),
    "double backward": lambda f: _higher(f, 2),
    "third order": lambda f: _higher(f, 3),
    "batched gradients": lambda f: _batched(f),
    "vmapped backward": lambda f: _vmapped(f),
}


def _dual(f: Callable[..., Tensor], x: Tensor) -> tuple[Tensor, ...]:
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(f(forward_ad.make_dual(x, BATCH[0])))
        return out.primal.detach(), out.tangent.detach()


def _higher(f: Callable[..., Tensor], order: int) -> tuple[Tensor, ...]:
    x, mask = Q.clone().requires_grad_(), MASK.clone().requires_grad_()
    total = scalar(f)(x, mask)
    for _ in range(order - 1):
        total = sum(g.sin().sum() for g in torch.autograd.grad(total, (x, mask), create_graph=True))
    return torch.autograd.grad(total, (x, mask))


def _batched(f: Callable[..., Tensor]) -> Tensor:
    x = Q.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, BATCH, is_grads_batched=True)[0]


def _vmapped(f: Callable[..., Tensor]) -> Tensor:
    x = Q.clone().requires_grad_()
    out = f(x)
    return vmap(lambda g: torch.autograd.grad(out, x, g, retain_graph=True)[0])(BATCH)


def of_mode(query: Tensor, *masks: Tensor) -> Tensor:
    with sus_backward(c=float("inf")):
        return F.scaled_dot_product_attention(query, K, V, *masks)


def of_operator(query: Tensor, *masks: Tensor) -> Tensor:
    return sus_attention(query, K, V, *masks, c=float("inf"))


@pytest.mark.parametrize("how", [of_operator, of_mode], ids=["sus_attention", "sus_backward"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_exact(name: str, how: Callable[..., Tensor]) -> None:
    found, true = TRANSFORMS[name](how), TRANSFORMS[name](by_hand)
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("name", ["jvp", "grad", "jacrev", "vmap(grad)", "hessian"])
def test_inside_of_a_compiled_function(name: str) -> None:
    """The graph holds the transform; a graph of torch.compile without SUS has sus_attention in it all the same."""
    true = TRANSFORMS[name](by_hand)
    for f, backend in ((of_operator, "aot_eager"), (by_hand, SUSBackend(c=2, compiler="aot_eager"))):
        torch._dynamo.reset()
        compiled = torch.compile(lambda f=f: TRANSFORMS[name](f), backend=backend)
        torch.testing.assert_close(compiled(), true)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_tangent_at_a_compiled_region_is_no_zero(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(by_hand, backend=SUSBackend(c=2, compiler=compiler))
    compiled(Q)
    if compiler == "eager":
        torch.testing.assert_close(_dual(compiled, Q), _dual(by_hand, Q))
    else:
        with pytest.raises(NotImplementedError, match="SUS attention in a compiled graph has no forward-mode"):
            _dual(compiled, Q)
    with forward_ad.dual_level():  # without a tangent
        torch.testing.assert_close(compiled(Q), by_hand(Q))
    torch.testing.assert_close(jvp(compiled, (Q,), (BATCH[0],)), TRANSFORMS["jvp"](by_hand))


def test_second_derivative_with_dropout_names_the_way_out() -> None:
    x = Q.clone().requires_grad_()
    (first,) = torch.autograd.grad(sus_attention(x, K, V, c=3, dropout_p=0.1).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"SUS attention has no second derivative with dropout.*sdpa_kernel"):
        first.sum().backward()


def test_as_the_library_in_math() -> None:
    """float32, every argument: gradients of gradients of all tensors."""

    def run(attention: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, h, 6, 8, requires_grad=True) for h in (4, 2, 2))
        out = attention(q, k, v, is_causal=True, scale=0.4, enable_gqa=True)
        first = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v)))

    with sdpa_kernel(SDPBackend.MATH):
        expected = run(F.scaled_dot_product_attention)
    found = run(lambda *args, **kwargs: sus_attention(*args, **kwargs, c=float("inf")))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_exact_attention_is_the_reference(name: str) -> None:
    tensors, static, _ = CASES[name].build()
    true = dense_attention(Dense(**tensors, **static))
    given = {"scale": tensors["query"].shape[-1] ** -0.5, **static}
    torch.testing.assert_close(exact_attention(**tensors, **given), true.to(tensors["query"].dtype))
    if "sinks" not in tensors:
        direction = torch.randn_like(tensors["query"])
        c, seed = torch.tensor(2.0, dtype=torch.float64), torch.tensor(1)

        def of(query: Tensor) -> Tensor:
            return attend(**{**tensors, "query": query}, **given, c=c, seed=seed)

        def reference(query: Tensor) -> Tensor:
            return dense_attention(Dense(**{**tensors, "query": query}, **static)).to(query.dtype)

        ours, its = (jvp(f, (tensors["query"],), (direction,))[1] for f in (of, reference))
        torch.testing.assert_close(ours, its)
