"""Operands that are written to between forward and backward: an error where PyTorch has one, else exact gradients."""

import math
import sys
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fx_passes import SUSBackend, sus_attention, sus_backward
from fx_passes.ops.snapshot import snapshot
from tests.passes.find import attention_packages
from tests.uses import USES

Call = Callable[[dict[str, Tensor], float], Tensor]


def sdpa(x: dict[str, Tensor], p: float) -> Tensor:
    return F.scaled_dot_product_attention(x["query"], x["key"], x["value"], x["mask"], p)


def by_mode(x: dict[str, Tensor], p: float) -> Tensor:
    with sus_backward(c=math.inf) as sus:
        out = sdpa(x, p)
    assert sus.calls == 1
    return out


def by_function(x: dict[str, Tensor], p: float) -> Tensor:
    return sus_attention(x["query"], x["key"], x["value"], x["mask"], p, c=math.inf)


def operands(mask: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    names = ("query", "key", "value")
    x = {name: torch.randn(1, 2, 20, 8, dtype=torch.float64, requires_grad=True) * 1 for name in names}
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    x["mask"] = causal if mask == "bool" else torch.zeros(20, 20, dtype=torch.float64).masked_fill(~causal, -1e9)
    if mask == "padding":
        x["mask"] = (torch.arange(24) < 20).view(1, 1, 1, -1)[..., 4:]
    if mask == "learned":
        x["mask"] = x["mask"].requires_grad_() * 1
    return x


def gradients(call: Call, mask: str, p: float, written: str | None) -> dict[str, Tensor]:
    x = operands(mask)
    for value in x.values():
        if value.requires_grad:
            value.retain_grad()
    out = call(x, p)
    if written is not None:
        with torch.no_grad():
            x[written].fill_(1)
    out.square().sum().backward()
    return {name: value.grad for name, value in x.items() if value.requires_grad}  # type: ignore[misc]


@pytest.mark.parametrize("call", [by_mode, by_function])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("mask", ["bool", "padding", "float", "learned"])
@pytest.mark.parametrize("written", ["query", "key", "value", "mask"])
def test_as_the_library(call: Call, p: float, mask: str, written: str) -> None:
    try:
        gradients(sdpa, mask, p, written)
    except RuntimeError as error:
        with pytest.raises(type(error), match="inplace"):
            gradients(call, mask, p, written)
        return
    expected, found = gradients(call, mask, p, None), gradients(call, mask, p, written)
    for name, grad in expected.items():
        assert torch.equal(grad, found[name]), name


def by_hand(x: dict[str, Tensor], p: float) -> Tensor:
    return torch.softmax(x["query"] @ x["key"].mT / 8 + x["mask"], -1) @ x["value"]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize(("f", "mask"), [(sdpa, "bool"), (sdpa, "padding"), (by_hand, "float")])
def test_compiled(compiler: str, f: Call, mask: str) -> None:
    backend = SUSBackend(c=math.inf, compiler=compiler)  # type: ignore[arg-type]
    compiled = torch.compile(f, backend=backend)
    expected, found = gradients(compiled, mask, 0.0, None), gradients(compiled, mask, 0.0, "mask")
    assert backend.report.rewritten == 1
    for name, grad in expected.items():
        assert torch.equal(grad, found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(("f", "mask"), [(sdpa, "bool"), (by_hand, "float")])
def test_compiled_with_inductor(f: Call, mask: str) -> None:
    test_compiled("inductor", f, mask)


@pytest.mark.parametrize("call", [by_mode, by_function])
@pytest.mark.parametrize(("mask", "p"), [("bool", 0.0), ("float", 0.0), ("learned", 0.0), ("float", 1e-9)])
@pytest.mark.parametrize(("heads", "e"), [(2, 8), (2, 5), (1, 8)])
def test_uses_of_the_result(call: Call, mask: str, p: float, heads: int, e: int) -> None:
    """The result may be viewed and written to where the library's may."""

    def run(call: Call, use: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = operands(mask)
        x |= {name: x[name][:, :heads] for name in ("query", "key", "value")}
        x["value"] = x["value"][..., :e]
        out = use(call(x, p))
        wanted = [value for value in x.values() if value.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

    tried = 0
    for name, use in USES.items():
        try:
            expected = run(sdpa, use)
        except RuntimeError:
            continue
        for a, b in zip(expected, run(call, use), strict=True):
            torch.testing.assert_close(b, a, msg=lambda text, name=name: f"{name}: {text}")
        tried += 1
    assert tried >= 3


@pytest.mark.parametrize("call", [by_mode, by_function])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)])
def test_layout_of_the_result(call: Call, p: float, order: tuple[int, ...]) -> None:
    x: dict[str, Tensor] = {
        name: torch.empty_permuted((2, 3, 6, 8), order).normal_().requires_grad_() for name in ("query", "key", "value")
    }
    x["mask"] = torch.ones(6, 6, dtype=torch.bool).tril()
    assert call(x, p).stride() == sdpa(x, p).stride()


def test_only_masks_of_others_are_copied() -> None:
    """A mask that the graph makes is nobody else's, unless the graph itself writes to it later."""

    def own(q: Tensor, causal: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, causal & causal.mT.logical_not())

    def written(q: Tensor, causal: Tensor) -> Tensor:
        mask = causal.clone()
        out = F.scaled_dot_product_attention(q, q, q, mask)
        mask.fill_(True)
        return out + F.scaled_dot_product_attention(q, q, q, mask)

    causal, graphs = torch.rand(20, 20) > 0.5, []
    for f in (own, written):
        x = operands("bool")["query"].detach().requires_grad_()
        backend = SUSBackend(c=math.inf, compiler="eager")
        seen: list[torch.fx.GraphModule] = []

        def keep(gm, example_inputs, backend=backend, seen=seen):  # type: ignore[no-untyped-def]
            seen.append(gm)
            return backend(gm, example_inputs)

        keep.rewrites_attention = True  # type: ignore[attr-defined]
        out = torch.compile(f, backend=keep)(x, causal)
        out.sum().backward()
        exact = x.detach().requires_grad_()
        f(exact, causal).sum().backward()
        assert torch.allclose(x.grad, exact.grad)  # type: ignore[arg-type]
        graphs.append(str(seen[0].graph))
        torch._dynamo.reset()
    assert "own_masks" in graphs[0]


def test_ids() -> None:
    found = []
    for write in (False, True):
        x, ids = operands("bool"), torch.arange(20) // 7
        out = sus_attention(x["query"], x["key"], x["value"], query_ids=ids, c=math.inf)
        if write:
            ids.zero_()
        found.append(torch.autograd.grad(out.square().sum(), x["query"])[0])
    assert torch.equal(*found)


def test_lengths_of_flash_attn() -> None:
    found = []
    for write in (False, True):
        ends = torch.tensor([0, 7, 20], dtype=torch.int32)
        x = torch.randn(20, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with attention_packages.installed(), sus_backward(c=math.inf) as sus:
            out = sys.modules["flash_attn"].flash_attn_varlen_func(x, x, x, ends, ends, 13, 13, causal=True)
        assert sus.calls == 1
        if write:
            ends.zero_()
        found.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*found)


def test_c_and_seed_as_tensors() -> None:
    found = []
    for write in (False, True):
        x = operands("bool")
        c, seed = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3)
        out = sus_attention(x["query"], x["key"], x["value"], c=c, seed=seed)
        if write:
            c.fill_(7), seed.fill_(9)
        found.append(torch.autograd.grad(out.square().sum(), x["query"])[0])
    assert torch.equal(*found)


def test_one_copy_for_all_layers_and_none_afterwards() -> None:
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    first = snapshot(mask)
    assert first.data_ptr() != mask.data_ptr()
    assert snapshot(mask).data_ptr() == first.data_ptr()
    assert snapshot(mask[None, None].expand(1, 1, 20, 20)).shape == (1, 1, 20, 20)
    mask.numpy()[0, 5] = True  # a write that no version counter shows
    assert snapshot(mask).data_ptr() != first.data_ptr()
    assert not first[0, 5]
    gone = weakref.ref(first.untyped_storage())
    del first
    assert gone() is None


def test_what_is_broadcast_stays_small() -> None:
    assert snapshot(torch.ones(1, 1, 1, 64).expand(4, 8, 64, 64)).untyped_storage().nbytes() == 256


def test_no_copy_without_a_gradient() -> None:
    x = {name: value.detach() for name, value in operands("bool").items()}
    from fx_passes.ops import snapshot as module

    module._copies.clear()
    sus_attention(x["query"], x["key"], x["value"], x["mask"])
    assert not module._copies
