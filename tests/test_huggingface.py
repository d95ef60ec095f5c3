"""transformers: attn_implementation="sus" on tiny real models, against "sdpa" and "eager"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
from fx_passes import huggingface  # noqa: E402
from fx_passes.huggingface import register_sus_attention, sus_mask  # noqa: E402

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def _model(kind: str, implementation: str, **more: Any) -> Any:
    config_class = getattr(transformers, f"{kind}Config")
    fields = {k: v for k, v in {**SMALL, **more}.items() if k != "head_dim" or kind != "Bert"}
    torch.manual_seed(0)
    name = "BertModel" if kind == "Bert" else f"{kind}ForCausalLM"
    return getattr(transformers, name)._from_config(config_class(**fields), attn_implementation=implementation)


def _step(model: Any, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    model.train()
    out = model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    if mask is not None:
        out = out * mask[..., None]
    (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


CASES = [
    ("Llama", {}, False),
    ("Llama", {}, True),
    ("Mistral", {"sliding_window": 7}, True),
    ("Gemma2", {"sliding_window": 7, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}, False),
    ("GptOss", {"sliding_window": 7, "num_local_experts": 2, "num_experts_per_tok": 1}, False),
    ("Bert", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}, True),
]


@pytest.mark.parametrize(("kind", "more", "padded"), CASES, ids=[f"{k}-{p}" for k, _, p in CASES])
def test_exact_and_active(kind: str, more: dict[str, Any], padded: bool) -> None:
    ids = torch.randint(1, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0
    sus = register_sus_attention(c=float("inf"))
    out, grad = _step(_model(kind, "sus", **more), ids, mask if padded else None)
    true_out, true_grad = _step(_model(kind, "eager", **more), ids, mask if padded else None)
    torch.testing.assert_close(out, true_out, rtol=1e-4, atol=1e-5)
    assert float((grad - true_grad).norm() / true_grad.norm()) < 1e-4
    sus.c = 2
    again, noisy = _step(_model(kind, "sus", **more), ids, mask if padded else None)
    torch.testing.assert_close(again, out)
    assert float((noisy - grad).norm() / grad.norm()) > 1e-3


def test_masks_stay_small() -> None:
    from transformers import masking_utils as m

    padding = torch.ones(2, 9, dtype=torch.bool)
    bands = {m.causal_mask_function: (None, 0), m.bidirectional_mask_function: (None, None)}
    for function, band in bands.items():
        mask = sus_mask(2, 9, 9, mask_function=function, attention_mask=padding)
        assert mask.shape == (2, 1, 1, 9)
        assert mask._sus_band == band
    mask = sus_mask(2, 9, 9, mask_function=m.sliding_window_causal_mask_function(4))
    assert mask.shape == (1, 1, 1, 9)
    assert mask._sus_band == (3, 0)


def test_unknown_mask_functions_are_evaluated() -> None:
    from transformers import masking_utils as m

    chunked = m.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int))
    mask = sus_mask(2, 9, 9, mask_function=chunked, device="cpu")
    i = torch.arange(9)
    expected = (i[:, None] >= i) & (i[:, None] // 4 == i // 4)
    assert torch.equal(mask, expected.expand(2, 1, 9, 9))
    either = m.or_masks(m.causal_mask_function, lambda b, h, q, k: k < 3)
    mask = sus_mask(2, 9, 9, mask_function=either, device="cpu")
    assert torch.equal(mask[0, 0], (i[:, None] >= i) | (i < 3))


def test_generation_with_a_cache() -> None:
    register_sus_attention(c=4)
    ids = torch.randint(1, 64, (1, 12), generator=torch.Generator().manual_seed(1))
    found, true = (
        _model("Llama", how).eval().generate(ids, max_new_tokens=5, do_sample=False) for how in ("sus", "sdpa")
    )
    assert torch.equal(found, true)


def test_models_without_data_and_fake_ones_run_and_are_counted() -> None:
    from torch._subclasses import FakeTensorMode

    sus = register_sus_attention(c=4)
    for around, reason in ((torch.device("meta"), "device meta"), (FakeTensorMode(), "class FakeTensor")):
        with around:
            model = _model("Llama", "sus")
            ids = torch.ones(2, 12, dtype=torch.long)
            out = model(input_ids=ids, attention_mask=ids, use_cache=False).logits
            out.sum().backward()
        assert out.shape == (2, 12, 64)
        assert reason in str(sus.report)
    assert (sus.calls, sum(sus.state.left.values())) == (0, 4)


def test_autocast_and_a_compiled_model_are_exact() -> None:
    sus = register_sus_attention(c=float("inf"))
    ids, mask = torch.randint(1, 64, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    with torch.autocast("cpu", torch.bfloat16):
        found, true = (_step(_model("Llama", how), ids, None)[0] for how in ("sus", "sdpa"))
    torch.testing.assert_close(found, true, rtol=5e-2, atol=5e-2)
    assert sus.calls == 2
    torch._dynamo.reset()
    compiled = torch.compile(_model("Llama", "sus"), backend="aot_eager")
    for padding in (None, mask):
        found, grad = _step(compiled, ids, padding)
        true, true_grad = _step(_model("Llama", "sdpa"), ids, padding)
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, true_grad, rtol=1e-3, atol=1e-4)
        compiled.zero_grad()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="c must be above 0"):
        register_sus_attention(c=-1)
    with pytest.raises(ValueError, match="sampler must be one of"):
        register_sus_attention(sampler="x")


LENGTHS = (9, 17, 1, 13)


def _flattened(**more: Any) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    features = [{"input_ids": torch.randint(1, 64, (n,), generator=g).tolist()} for n in LENGTHS]
    return dict(transformers.DataCollatorWithFlattening(return_tensors="pt", **more)(features))


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("kind", "fields"), [("Llama", {}), ("Mistral", {"sliding_window": 7})], ids=["Llama", "Mistral"]
)
@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True}], ids=["positions", "lengths"])
def test_packed_batches_are_those_of_each_document(
    kind: str, fields: dict[str, Any], more: dict[str, Any], use_cache: bool
) -> None:
    batch = _flattened(**more)
    batch.pop("labels")
    sus = register_sus_attention(c=float("inf"))
    packed, alone = _model(kind, "sus", **fields).double().train(), _model(kind, "sdpa", **fields).double().train()
    out = packed(**batch, use_cache=use_cache).logits[0]
    parts = batch["input_ids"][0].split(list(LENGTHS))
    expected = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in parts])
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
    grads = [
        torch.autograd.grad((x * weight).sum(), list(m.parameters())) for x, m in ((out, packed), (expected, alone))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    sus.c = 2
    moved = torch.autograd.grad(
        (packed(**batch, use_cache=use_cache).logits[0] * weight).sum(), list(packed.parameters())
    )
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(moved, grads[0], strict=True))


def test_packed_batches_have_no_mask_over_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = huggingface.attend

    def watched(*args: Any, **options: Any) -> Any:
        shapes.append((options["attn_mask"].shape, options["query_ids"].tolist(), options["left"], options["right"]))
        return real(*args, **options)

    monkeypatch.setattr(huggingface, "attend", watched)
    batch = _flattened()
    batch.pop("labels")
    register_sus_attention(c=4)
    _model("Mistral", "sus", sliding_window=7)(**batch, use_cache=False).logits.sum().backward()
    ids = [[i for i, n in enumerate(LENGTHS) for _ in range(n)]]
    assert shapes == [((1, 1, 1, sum(LENGTHS)), ids, 6, 0)] * 2


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("ends", [([0, 5, 12], [0, 5, 12]), ([0, 5, 12], [0, 9, 17]), ([0, 7, 12], [0, 2, 17])])
def test_queries_and_keys_of_other_lengths(ends: tuple[list[int], list[int]], masked: bool, causal: bool) -> None:
    """As in flash-attn: each document by itself, counted from its last query and its last key."""
    register_sus_attention(c=float("inf"))
    attention = transformers.AttentionInterface()["sus"]
    module = torch.nn.Module()
    module.is_causal = causal
    g = torch.Generator().manual_seed(0)
    m, n = ends[0][-1], ends[1][-1]
    q, k, v = (torch.randn(1, 2, x, 8, generator=g, dtype=torch.float64, requires_grad=True) for x in (m, n, n))
    bias = torch.randn(1, 2, m, n, generator=g, dtype=torch.float64) if masked else None
    parts = []
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        scores = q[:, :, a:b] @ k[:, :, c:d].mT * 8**-0.5 + (0 if bias is None else bias[..., a:b, c:d])
        if causal and not masked:  # transformers' masks have the band in them
            later = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
            scores = scores.masked_fill(later, -torch.inf)
        parts.append(torch.nan_to_num(scores.softmax(-1)) @ v[:, :, c:d])
    true = torch.cat(parts, 2).transpose(1, 2)
    true_grads = torch.autograd.grad(true.sin().sum(), (q, k, v))
    lengths = {f"cu_seq_lens_{x}": torch.tensor(e, dtype=torch.int32) for x, e in zip("qk", ends, strict=True)}
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    for function in (attention, compiled) if causal else (attention,):
        out = function(module, q, k, v, bias, **lengths)[0]
        torch.testing.assert_close(out, true, rtol=1e-9, atol=1e-9)
        for x, y in zip(torch.autograd.grad(out.sin().sum(), (q, k, v)), true_grads, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
