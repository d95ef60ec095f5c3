"""Models whose attention is a call: transformers with flex_attention, blocks as torchtitan writes them; memory."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fx_passes import SUSBackend, sus_backward
from tests.passes.find import attention_packages as packages
from tests.passes.find.test_calls import called
from tests.torch_versions import varlen_attn, varlen_options


@pytest.fixture
def flash_attn() -> Iterator[None]:
    with packages.installed():
        yield


def gradients(model: nn.Module, f: Callable[..., Tensor], *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
    out = f(*args, **kwargs)
    weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()), allow_unused=True)
    return out.detach(), [torch.zeros(()) if g is None else g for g in grads]


def check(model: nn.Module, f: Callable[..., Tensor], plain: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
    """The report of compiling `f`, which has the results and gradients of `plain`."""
    out, grads = gradients(model, plain, *args, **kwargs)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(f, backend=backend)
    got, got_grads = gradients(model, compiled, *args, **kwargs)
    for a, b in zip([got, *got_grads], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    backend.c = 2
    got, got_grads = gradients(model, compiled, *args, **kwargs)
    torch.testing.assert_close(got, out, rtol=1e-8, atol=1e-8)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(got_grads, grads, strict=True))
    return backend.report


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
HUGGING_FACE: dict[str, tuple[str, dict[str, Any], str, set[str]]] = {
    # Where a mask is traced, transformers looks for packed documents in any batch without padding.
    "Llama": ("Llama", {}, "none", {"causal + documents"}),
    "Llama, padded": ("Llama", {}, "padded", {"causal + mask"}),
    "Llama, packed": ("Llama", {}, "packed", {"causal + documents"}),
    "Mistral": ("Mistral", {"sliding_window": 7}, "none", {"causal, window 7 + documents"}),
    "Mistral, packed": ("Mistral", {"sliding_window": 7}, "packed", {"causal, window 7 + documents"}),
    "Gemma2": (
        "Gemma2", {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, "none",
        {"causal + documents", "causal, window 7 + documents"},
    ),
    "Qwen3": ("Qwen3", {}, "packed", {"causal + documents"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_transformers_with_flex_attention(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind, more, batch, masks = HUGGING_FACE[name]
    fields = {**SMALL, **more}

    def model(implementation: str) -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, f"{kind}ForCausalLM")._from_config(
            getattr(transformers, f"{kind}Config")(**fields), attn_implementation=implementation
        )
        return made.double().train()

    inputs: dict[str, Any] = {
        "input_ids": torch.randint(
            1, 64, (1 if batch == "packed" else 2, 40), generator=torch.Generator().manual_seed(1)
        ),
        "use_cache": False,
    }
    keep = torch.ones(1, dtype=torch.float64)
    if batch == "padded":
        inputs["attention_mask"] = torch.ones(2, 40, dtype=torch.long)
        inputs["attention_mask"][1, 30:] = 0
        keep = inputs["attention_mask"][..., None].double()
    if batch == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(n) for n in (9, 17, 1, 13)])[None]
    capped = "attn_logit_softcapping" in more
    tol = 1e-4 if capped else 1e-8  # "eager" has its softmax in float32, and "sdpa" no softcap
    flex, plain = model("flex_attention"), model("eager" if capped else "sdpa")
    plain.load_state_dict(flex.state_dict())
    expected = gradients(plain, lambda **kw: plain(**kw).logits * keep, **inputs)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(flex, backend=backend)
    got = gradients(flex, lambda **kw: compiled(**kw).logits * keep, **inputs)
    for a, b in zip([got[0], *got[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)
    assert {(s.form, s.status) for s in backend.report.sites} == {("flex", "rewritten")}
    assert {s.mask for s in backend.report.sites} == masks
    assert backend.report.rewritten == 2
    backend.c = 2
    moved = gradients(flex, lambda **kw: compiled(**kw).logits * keep, **inputs)[1]
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(moved, expected[1], strict=True))


class Block(nn.Module):
    """As torchtitan writes it: heads in dimension 2, rotary positions left out, a mask from outside."""

    def __init__(self, width: int, heads: int, attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.norm, self.qkv = nn.RMSNorm(width), nn.Linear(width, 3 * width, bias=False)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, mask: Any) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        split = (t.view(*t.shape[:-1], self.heads, -1) for t in (q, k, v))
        x = x + self.out(self.attention(*split, mask).flatten(-2))
        return x + self.down(nn.functional.silu(self.up(x)))


class Model(nn.Module):
    def __init__(self, attention: Callable[..., Tensor], width: int = 32, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Block(width, 4, attention) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Any = None) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(-3, -2)


def flexed(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


N = 48
LENGTHS = [7, 20, 1, 20]
DOCS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
SEEN = (DOCS[:, None] == DOCS) & torch.ones(N, N, dtype=torch.bool).tril()


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def documents(b: Any, h: Any, i: Any, j: Any) -> Any:
    return DOCS[i] == DOCS[j]


def test_a_torchtitan_block_with_flex_attention_and_documents() -> None:
    block = create_block_mask(and_masks(causal, documents), None, None, N, N, device="cpu")
    model, plain = Model(flexed).double(), Model(dense).double()
    ids = torch.arange(2 * N).view(2, N) % 50
    report = check(model, lambda: model(ids, block), lambda: plain_of(plain, model)(ids, SEEN))
    assert [(s.form, s.mask) for s in report.sites] == [("flex", "causal + documents")] * 2
    assert report.rewritten == 2


def plain_of(plain: nn.Module, model: nn.Module) -> Callable[..., Tensor]:
    """The plain model's forward with the other's parameters."""
    return lambda *args: torch.func.functional_call(plain, dict(model.named_parameters()), args)


def test_a_torchtitan_block_with_varlen_attention() -> None:
    options = varlen_options({"window_size": (-1, 0)})

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        parts = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*parts, mask, mask, 20, 20, **options).view(q.shape)

    model, plain = Model(attention).double(), Model(dense).double()
    ids = (torch.arange(N) % 50)[None]
    report = check(model, lambda: model(ids, ENDS), lambda: plain_of(plain, model)(ids, SEEN))
    assert [(s.form, s.mask, s.tier) for s in report.sites] == [("varlen", "causal + documents", 1)] * 2


def test_a_model_with_flash_attention_and_one_with_checkpointing(flash_attn: None) -> None:
    flash = called("flash_attn", "flash_attn_func", {"causal": True})
    model, plain = Model(lambda q, k, v, _: flash(q, k, v)).double(), Model(dense).double()
    ids = torch.arange(2 * N).view(2, N) % 50
    seen = torch.ones(N, N, dtype=torch.bool).tril()
    report = check(model, lambda: model(ids), lambda: plain_of(plain, model)(ids, seen))
    assert [(s.form, s.mask) for s in report.sites] == [("flash", "causal")] * 2

    def checkpointed() -> Tensor:
        x = model.embed(ids)
        for layer in model.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, None, use_reentrant=False)
        return x

    report = check(model, checkpointed, lambda: plain_of(plain, model)(ids, seen))
    assert report.rewritten == 2


@pytest.mark.slow
def test_inductor_trains_flex_attention_on_a_cpu() -> None:
    block = create_block_mask(and_masks(causal, documents), None, None, N, N, device="cpu")
    model, plain = Model(flexed, layers=1), Model(dense, layers=1)
    ids = torch.arange(2 * N).view(2, N) % 50
    out, grads = gradients(model, plain_of(plain, model), ids, SEEN)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"))
    got, got_grads = gradients(model, torch.compile(model, backend=backend), ids, block)
    for a, b in zip([got, *got_grads], [out, *grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert backend.report.rewritten == 1


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.element_size():  # not only broadcast
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


LONG = 1200
LONG_DOCS = torch.arange(LONG) // 70
LONG_BATCH = torch.stack([LONG_DOCS, torch.arange(LONG) // 55])
LONG_OTHER_ENDS = torch.tensor([*range(0, LONG - 70, 140), *[LONG] * 10], dtype=torch.int32)
LONG_ENDS = torch.tensor([*range(0, LONG, 70), LONG], dtype=torch.int32)


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i - j < 33


def of_batch(b: Any, h: Any, i: Any, j: Any) -> Any:
    return LONG_BATCH[b, i] == LONG_BATCH[b, j]


def real_rows(b: Any, h: Any, i: Any, j: Any) -> Any:
    return LONG_BATCH[b, i] > 0


def real_keys(b: Any, h: Any, i: Any, j: Any) -> Any:
    return LONG_BATCH[b, j] < 5


def flexible(*masks: Any) -> Callable[..., Tensor]:
    block = create_block_mask(and_masks(*masks), 2, None, LONG, LONG, device="cpu")
    return lambda q, k, v: flex_attention(q, k, v, block_mask=block)


def flash_varlen(q: Tensor, k: Tensor, v: Tensor, keys: Tensor = LONG_ENDS) -> Tensor:
    function = sys.modules["flash_attn"].flash_attn_varlen_func
    return function(q, k, v, LONG_ENDS, keys, 70, 140, causal=True)


LINEAR: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "flex, causal": lambda: flexible(causal),
    "flex, window": lambda: flexible(causal, window),
    "flex, documents": lambda: flexible(causal, of_batch),
    "flex, documents, rows and keys": lambda: flexible(causal, of_batch, real_rows, real_keys),
    "flex, rows and keys": lambda: flexible(real_rows, real_keys),
    "flex, two kinds of documents": lambda: flexible(of_batch, lambda b, h, i, j: LONG_DOCS[i] == LONG_DOCS[j]),
    "packed, flash": lambda: flash_varlen,
    "packed, flash, other lengths": lambda: lambda q, k, v: flash_varlen(q, k, v, LONG_OTHER_ENDS),
    "packed, torch": lambda: lambda q, k, v: varlen_attn(q, k, v, LONG_ENDS, LONG_ENDS, 70, 70, window_size=(32, 0)),
}
DENSE: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "flex, dilated": lambda: flexible(causal, lambda b, h, i, j: (i - j) % 3 == 0),
    "flex, neighbourhood in two dimensions": lambda: flexible(
        lambda b, h, i, j: ((i // 40 - j // 40).abs() <= 2) & ((i % 40 - j % 40).abs() <= 2)
    ),
}


def largest_tensor(name: str, f: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of the largest tensor that a rewritten call makes, forward and backward."""
    shape = (LONG, 1, 4) if "packed" in name else (2, 1, LONG, 4)
    args = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    largest = Largest()

    def watched(_: str, gm: Any, *more: Any) -> Any:
        def run(*args: Any) -> Any:
            with largest:
                return gm(*args)

        return run

    monkeypatch.setattr("fx_passes.backend._compile", watched)
    torch._dynamo.reset()
    backend = SUSBackend(c=4, compiler="eager")
    out = torch.compile(f, backend=backend)(*args)
    with largest:
        out.sum().backward()
    (site,) = backend.report.sites
    assert (site.status, site.tier) == ("rewritten", 1)
    return largest.elements


@pytest.mark.parametrize("name", LINEAR)
def test_no_tensor_over_queries_and_keys(name: str, flash_attn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < largest_tensor(name, LINEAR[name](), monkeypatch) < LONG * LONG / 8


@pytest.mark.parametrize("name", DENSE)
def test_other_masks_are_one_tensor_for_all_entries_and_heads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert largest_tensor(name, DENSE[name](), monkeypatch) == LONG * LONG


@pytest.mark.parametrize(("package", "option"), [("flash_attn.flash_attn_func", "dropout_p"), ("xformers", "p")])
def test_dropout_of_a_call(package: str, option: str, flash_attn: None) -> None:
    """One-hot values show the weights: those that are kept are 1 / (1 - p) of what they were, and the others 0."""
    name = "memory_efficient_attention" if package == "xformers" else "flash_attn_func"
    function = getattr(sys.modules["xformers.ops" if package == "xformers" else "flash_attn"], name)
    n, p = 60, 0.3
    q, k = (torch.randn(1, n, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.eye(n, dtype=torch.float64)[None, :, None].expand(1, n, 2, n).clone().requires_grad_()
    probs = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 8**-0.5).softmax(-1).transpose(1, 2)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler="eager")
    compiled = torch.compile(lambda q, k, v: function(q, k, v, **{option: p}), backend=backend)
    means = []
    for how in (compiled, function):
        block = contextlib.nullcontext() if how is compiled else sus_backward(c=float("inf"))
        for _ in range(3):
            with block:
                out = how(q, k, v) if how is compiled else how(q, k, v, **{option: p})
            kept = out != 0
            torch.testing.assert_close(out, torch.where(kept, probs / (1 - p), 0))
            rate = kept.double().mean().item()
            assert abs(rate - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
            means.append(kept)
            grad = torch.randn_like(out)
            grads = torch.autograd.grad(out, (q, k, v), grad)
            expected = torch.autograd.grad(torch.where(kept, probs / (1 - p), 0), (q, k), grad, retain_graph=True)
            dv = (out.transpose(1, 2).mT @ grad.transpose(1, 2)).transpose(1, 2)
            for a, b in zip(grads, (*expected, dv), strict=True):
                torch.testing.assert_close(a, b)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(means))
    assert backend.report.rewritten == 1
