"""Calls of flash-attn, xformers, torch's varlen_attn and flex_attention, the real ones, against SUS in their place."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fx_passes import SUSBackend, sus_backward

from .rows import Row, Session, describe

Function = Callable[..., Any]
_TOLERANCE = 2e-2  # of bfloat16 results, relative to the norm


@dataclass(frozen=True)
class Case:
    """One call: `options` of a device; `packed` is [T, H, D], else [B, N, H, D]; `keys` heads of key and value."""

    module: str
    function: str
    what: str
    options: Callable[[str], dict[str, Any]] = field(default=lambda device: {})
    packed: bool = False
    keys: int = 4
    width: int = 1  # of qkv (3) or kv (2) in one tensor

    @property
    def key(self) -> str:
        return f"{self.module}.{self.function}, {self.what}"


LENGTHS = (100, 28, 1, 127)


def _lengths(device: str, **more: Any) -> dict[str, Any]:
    ends = torch.tensor([0, *LENGTHS], device=device).cumsum(0).int()
    longest = max(LENGTHS)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest, **more}


def _slopes(device: str) -> dict[str, Any]:
    return {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device)}


def _sinks(device: str) -> dict[str, Any]:
    return {"causal": True, "learnable_sink": torch.linspace(-1, 1, 4, device=device).bfloat16()}


def _bias(name: str, *args: Any, packed: bool = False) -> Callable[[str], dict[str, Any]]:
    def make(device: str) -> dict[str, Any]:
        kind = getattr(importlib.import_module("xformers.ops.fmha.attn_bias"), name)
        made = kind.from_seqlens(list(LENGTHS)) if packed else kind(*args)
        return {"attn_bias": made.to(torch.device(device)) if packed else made}

    return make


def cases() -> Iterator[Case]:
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        yield Case(module, "flash_attn_func", "all keys")
        yield Case(module, "flash_attn_func", "causal, GQA", lambda _: {"causal": True}, keys=2)
        yield Case(module, "flash_attn_func", "window", lambda _: {"window_size": (30, 7)})
        yield Case(module, "flash_attn_func", "softcap", lambda _: {"causal": True, "softcap": 5.0})
        yield Case(module, "flash_attn_varlen_func", "lengths", lambda d: _lengths(d, causal=True), packed=True)
    yield Case("flash_attn", "flash_attn_func", "ALiBi", _slopes)
    yield Case("flash_attn", "flash_attn_qkvpacked_func", "causal", lambda _: {"causal": True}, width=3)
    yield Case("flash_attn", "flash_attn_kvpacked_func", "causal", lambda _: {"causal": True}, width=2)
    yield Case("flash_attn_interface", "flash_attn_qkvpacked_func", "causal", lambda _: {"causal": True}, width=3)
    yield Case("flash_attn.cute", "flash_attn_func", "sinks", _sinks)
    xformers = partial(Case, "xformers.ops", "memory_efficient_attention")
    yield xformers("all keys")
    yield xformers("causal", _bias("LowerTriangularMask"))
    yield xformers("local", _bias("LocalAttentionFromBottomRightMask", 30, 7))
    yield xformers("packed", _bias("BlockDiagonalMask", packed=True), width=1)
    yield xformers("packed, causal", _bias("BlockDiagonalCausalMask", packed=True))
    varlen = partial(Case, "torch.nn.attention.varlen", "varlen_attn", packed=True)
    yield varlen("documents", _positional)
    yield varlen("causal", lambda d: {**_positional(d), "window_size": (-1, 0)})
    flex = partial(Case, "torch.nn.attention.flex_attention", "flex_attention")
    yield flex("causal", lambda d: _block(lambda b, h, i, j: i >= j, d))
    yield flex("documents", lambda d: _block(lambda b, h, i, j: (i // 100 == j // 100) & (i >= j), d))
    yield flex("softcap", lambda d: {"score_mod": lambda s, b, h, i, j: 5 * torch.tanh(s / 5)})


def _positional(device: str) -> dict[str, Any]:
    given = _lengths(device)
    return dict(zip(("cu_seq_q", "cu_seq_k", "max_q", "max_k"), given.values(), strict=True))


def _block(mask_mod: Function, device: str) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    return {"block_mask": create_block_mask(mask_mod, None, None, sum(LENGTHS), sum(LENGTHS), device=device)}


def call(case: Case, device: str) -> tuple[Function, list[Tensor]]:
    """The call as a function of tensors that want gradients, which returns the output, and these tensors."""
    g = torch.Generator(device).manual_seed(0)
    function, options = getattr(importlib.import_module(case.module), case.function), case.options(device)
    in_documents = case.packed or "packed" in case.what

    def tensor(*shape: int) -> Tensor:
        batch = () if case.packed else (1,) if in_documents else (2,)
        return torch.randn(*batch, *shape, generator=g, device=device).bfloat16().requires_grad_()

    n, d, (heads, keys) = sum(LENGTHS), 64, (4, case.keys)
    shapes = {
        1: [(n, heads, d), (n, keys, d), (n, keys, d)],
        2: [(n, heads, d), (n, 2, keys, d)],
        3: [(n, 3, heads, d)],
    }[case.width]

    def run(*tensors: Tensor) -> Tensor:
        if case.function == "flex_attention":  # [B, H, N, D]
            tensors = tuple(x.transpose(1, 2) for x in tensors)
        out = function(*tensors, **options)
        return out[0] if isinstance(out, tuple) else out

    return run, [tensor(*shape) for shape in shapes]


def results(function: Function, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients."""
    out = function(*tensors)
    weight = torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, weight)]


def distance(found: list[Tensor], true: list[Tensor]) -> float:
    errors = ((a.float() - b.float()).norm() / b.float().norm() for a, b in zip(found, true, strict=True))
    return round(max(map(float, errors)), 5)


def compare(case: Case, device: str) -> Iterator[Row]:
    """The function itself, `sus_backward` around it and `SUSBackend` at c = inf, and at c = 2, with other gradients."""
    function, tensors = call(case, device)
    row: Row = {"package": case.module, "function": case.function, "what": case.what}
    if case.function == "flex_attention":
        from torch.nn.attention import flex_attention

        torch._dynamo.reset()
        plain = torch.compile(function, backend="inductor" if device == "cuda" else "eager")
        if device == "cpu":  # torch trains it on a GPU alone: its own eager form
            flex_attention._validate_device = lambda *_: None
    else:
        plain = function
    true = results(plain, tensors)
    with sus_backward(c=float("inf")) as sus:
        row["eager"] = distance(results(function, tensors), true)
    torch._dynamo.reset()
    backend = SUSBackend(c=float("inf"), compiler="aot_eager")
    compiled = torch.compile(function, backend=backend)
    row["compiled"] = distance(results(compiled, tensors), true)
    backend.c = 2
    row["moved"] = distance(results(compiled, tensors), true)
    row |= {"sites": [f"{s.form}, {s.mask}, {s.status}" for s in backend.report.sites], "calls": sus.calls}
    exact = max(row["eager"], row["compiled"]) < _TOLERANCE < row["moved"]
    yield {**row, "ok": exact and backend.report.rewritten == 1 and sus.calls == 1}


def run(session: Session) -> None:
    for case in cases():
        root = case.module.partition(".")[0]
        row = {"key": case.key, "package": case.module}
        try:
            found = importlib.util.find_spec(root) is not None and importlib.util.find_spec(case.module) is not None
            reason = "" if found else "not installed"
        except Exception as error:
            reason = f"not installed: {describe(error)}"
        if not reason and session.device == "cpu" and case.function != "flex_attention":
            reason = "not run: it needs a GPU"
        if not reason and session.tiny and case.what != "documents":
            reason = "not run: toy sizes"
        if reason:
            session.write({**row, "note": reason})
        else:
            session.unit(case.key, lambda case=case: compare(case, session.device), 60)  # type: ignore[misc]
