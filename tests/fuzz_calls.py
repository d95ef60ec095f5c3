"""Random calls of attention through the Python API, each against PyTorch's own function and float64.

Run as ``python -m tests.fuzz_calls SEED COUNT``: it prints how many cases of each kind it tried, and exits with 1 after
the first that is wrong. It is a process of its own, so that a crash in native code is a failure of one case.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

from fx_passes import sus_attention, sus_backward

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("plain", "rows first", "columns first", "every second", "offset", "expanded")
MASKS = (None, "bool", "float", "bias", "row without keys", "causal")
SPECIAL = (None, None, None, "inf", "-inf", "nan", "zeros")


@dataclass(frozen=True)
class Case:
    """One call. `sizes` are leading dimensions, heads, query heads per key head, M, N, D, E."""

    number: int
    dtype: torch.dtype
    lead: tuple[int, ...]
    heads: int
    group: int
    lengths: tuple[int, int]
    widths: tuple[int, int]
    layouts: tuple[str, str, str]
    exponents: tuple[int, int, int]
    special: tuple[str | None, str | None, str | None]
    mask: str | None
    scale: float | None
    c: float
    sampler: str
    forward: str

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        make = torch.Generator().manual_seed(self.number)
        groups = (self.heads * self.group, self.heads, self.heads)
        m, n = self.lengths
        shapes = [(*self.lead, h, length, w) for h, length, w in zip(groups, (m, n, n), self._widths(), strict=True)]
        qkv = [
            self._tensor(make, *given) for given in zip(shapes, self.layouts, self.exponents, self.special, strict=True)
        ]
        mask = None
        if self.mask == "bool":
            mask = torch.rand(m, n, generator=make) > 0.4
        elif self.mask == "row without keys":
            mask = (torch.rand(m, n, generator=make) > 0.4) & (torch.arange(m) % 2 > 0)[:, None]
        elif self.mask == "float":
            mask = torch.randn(m, n, generator=make).to(self.dtype)
            mask = mask.masked_fill(torch.rand(m, n, generator=make) > 0.8, -math.inf)
        elif self.mask == "bias":
            mask = (torch.randn(self.heads * self.group, m, n, generator=make) * 5).to(self.dtype).requires_grad_()
        return (*qkv, mask)  # type: ignore[return-value]

    def _widths(self) -> tuple[int, int, int]:
        return self.widths[0], self.widths[0], self.widths[1]

    def _tensor(
        self, make: torch.Generator, shape: tuple[int, ...], layout: str, exponent: int, special: str | None
    ) -> Tensor:
        *lead, h, length, width = shape
        stored = {
            "rows first": (*lead, length, h, width),
            "columns first": (*lead, h, width, length),
            "every second": (*lead, h, length, 2 * width),
            "offset": (*lead, h, length + 1, width + 1),
            "expanded": (*lead, 1, length, width),
        }.get(layout, shape)
        x = torch.randn(stored, generator=make, dtype=torch.float64) * 10.0**exponent
        if special is not None and x.numel():
            at = int(torch.randint(x.numel(), (), generator=make))
            x.view(-1)[at] = 0.0 if special == "zeros" else float(special)
            x = x * 0 if special == "zeros" else x
        x = x.to(self.dtype).requires_grad_()
        views = {
            "rows first": lambda: x.transpose(-3, -2),
            "columns first": lambda: x.mT,
            "every second": lambda: x[..., ::2],
            "offset": lambda: x[..., 1:, 1:],
            "expanded": lambda: x.expand(shape),
        }
        return views.get(layout, lambda: x)()


@st.composite
def cases(draw: Any) -> Case:
    sizes = st.sampled_from((1, 1, 2, 3, 5, 8, 17, 40, 0))
    exponent = st.one_of(st.just(0), st.just(0), st.integers(-38, 38))
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.booleans()):  # usual magnitudes: values are compared
        exponents, special = (0, 0, 0), (None, None, None)
    else:
        exponents = draw(st.tuples(exponent, exponent, exponent))
        special = draw(st.tuples(*[st.sampled_from(SPECIAL)] * 3))
    width = draw(st.sampled_from((1, 3, 8, 16, 20)))
    return Case(
        number=draw(st.integers(0, 1 << 30)),
        dtype=dtype,
        lead=draw(st.sampled_from(((), (1,), (2,), (3,), (2, 2), (0,)))),
        heads=draw(st.sampled_from((1, 2, 3))),
        group=draw(st.sampled_from((1, 1, 2))),
        lengths=(draw(sizes), draw(sizes)),
        widths=(width, draw(st.sampled_from((width, width, 5)))),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 3)),
        exponents=exponents,
        special=special,
        mask=draw(st.sampled_from(MASKS)),
        scale=draw(st.sampled_from((None, None, 0.3, 1.0, -0.5, 0.0, 1e-30, 1e30))),
        c=draw(st.sampled_from((0.5, 2.0, 30.0, math.inf, math.inf))),
        sampler=draw(st.sampled_from(("systematic", "independent"))),
        forward=draw(st.sampled_from(("auto", "library"))),
    )


def result(case: Case, exact: bool) -> tuple[Any, list[Tensor | None]]:
    q, k, v, mask = case.tensors()
    options = {"is_causal": case.mask == "causal", "scale": case.scale, "enable_gqa": case.group > 1}
    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    grads: tuple[Tensor | None, ...] = ()
    try:
        if exact:
            out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        else:
            with sus_backward(case.c, case.sampler, seed=case.number, forward=case.forward):
                out = F.scaled_dot_product_attention(q, k, v, mask, **options)
        if out.requires_grad:
            weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
            grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return type(error), []
    return out.detach(), list(grads)


def reference(case: Case) -> tuple[Tensor, list[Tensor]] | None:
    """In float64; None where the call is not one of usual magnitudes."""
    if case.exponents != (0, 0, 0) or any(case.special) or not all((*case.lengths, *case.lead)):
        return None
    if case.scale is not None and abs(case.scale) > 1:
        return None
    q, k, v, mask = case.tensors()
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.detach().double()
    repeated = [x.repeat_interleave(case.group, -3) for x in (k, v)]
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    logits = q @ repeated[0].mT * scale
    if case.mask == "causal":
        mask = torch.ones(case.lengths, dtype=torch.bool).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    blind = (logits == -math.inf).all(-1, keepdim=True)
    out = torch.softmax(logits.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0) @ repeated[1]
    weights = torch.sin(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), (q, k, v)))


def check(case: Case, tried: Counter[str]) -> None:
    found, true = result(case, exact=False), result(case, exact=True)
    tried["cases"] += 1
    if isinstance(true[0], type):
        assert found[0] is true[0], (found[0], true[0])
        tried["refused by both"] += 1
        return
    assert not isinstance(found[0], type), found[0]
    assert (found[0].shape, found[0].dtype, len(found[1])) == (true[0].shape, true[0].dtype, len(true[1]))
    for a, b in zip(found[1], true[1], strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or (a.shape, a.dtype) == (b.shape, b.dtype)
    oracle = reference(case)
    if oracle is not None and bool(true[0].isnan().any()):  # a scale of 0 or below times a mask of -inf
        tried["NaN in PyTorch, and NaN or right here"] += 1
        if bool(found[0].isnan().any()):
            assert torch.equal(found[0].isnan(), true[0].isnan())
            return
    if oracle is None:
        tried["unusual magnitudes, shapes and exceptions only"] += 1
        if case.exponents == (0, 0, 0):
            return
        # Where PyTorch has finite numbers of a usual size all along, so have we.
        finite = all(x is None or bool(x.isfinite().all()) for x in (true[0], *true[1]))
        if finite and float(true[0].abs().max() if true[0].numel() else 0) < 1e30 and case.dtype == torch.float64:
            assert bool(found[0].isfinite().all())
            tried["unusual magnitudes, finite where PyTorch is"] += 1
        return
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[case.dtype]
    torch.testing.assert_close(found[0].double(), oracle[0], rtol=tolerance, atol=tolerance)
    tried["values in float64: forward"] += 1
    assert all(x is None or bool(x.isfinite().all()) for x in found[1])
    if math.isinf(case.c):
        for a, b in zip(found[1][:3], oracle[1], strict=True):
            if a is not None:
                size = float(b.abs().max()) + 1
                torch.testing.assert_close(a.double() / size, b / size, rtol=0, atol=4 * tolerance)
        tried["values in float64: gradients"] += 1


def main(start: int, count: int) -> None:
    tried: Counter[str] = Counter()
    torch.set_num_threads(1)

    @seed(start)
    @settings(
        max_examples=count, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
    )
    @given(cases())
    def run(case: Case) -> None:
        print(case, file=sys.stderr, flush=True)  # the last line says which case a crash belongs to
        check(case, tried)

    run()
    print(dict(tried))


ARGUMENTS = {
    "c": (0.5, 30.0, math.inf, 0, -1, "30", True, 1j, 10**400, None, math.nan, torch.tensor(2.0), torch.ones(2), []),
    "seed": (None, 3, -1, 1 << 65, 1.5, True, "1", torch.tensor(1), torch.tensor(1.0), torch.ones(1), 1j),
    "dropout_p": (0.0, 0, 0.5, 1.0, -1, "x", None, math.nan, True, 10**400, 1j),
    "scale": (None, 0.5, 1, 0.0, -1.0, math.inf, math.nan, "x", True, 10**400, 1j, []),
    "is_causal": (False, True, 1, None, "x"),
    "enable_gqa": (False, True, 1, None),
    "sampler": ("systematic", "independent", "x", None, 3, []),
    "forward": ("auto", "library", "x", None),
    "attn_mask": (None, torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), torch.ones(3), [[1]], "x",
                  torch.ones(4, 4, device="meta"), torch.eye(4).to_sparse(), torch.ones(4, 4, dtype=torch.int32)),
    "query": (torch.ones(1, 2, 4, 8), torch.ones(2, 4, 8), torch.ones(4), None, "x", torch.ones(1, 2, 4, 8).int(),
              torch.ones(1, 2, 4, 8, device="meta"), torch.ones(1, 2, 4, 8).to_sparse(), torch.ones(1, 2, 4, 0)),
}  # fmt: skip


def arguments(start: int, count: int) -> None:
    """Right and wrong arguments of `sus_attention` together: a result, or an error that names one of them."""
    tried: Counter[str] = Counter()
    names = [*ARGUMENTS, "key", "value", "number of key heads", "batch dimensions"]

    @seed(start)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate])
    @given(st.fixed_dictionaries({}, optional={name: st.sampled_from(values) for name, values in ARGUMENTS.items()}))
    def run(given: dict[str, Any]) -> None:
        x = torch.randn(1, 2, 4, 8, requires_grad=True)
        tried["calls"] += 1
        try:
            sus_attention(**{"query": x, "key": x, "value": x, "c": 3.0, **given}).sum()
            tried["taken"] += 1
        except (TypeError, ValueError) as error:
            text = str(error)
            tried["refused by name"] += 1
        else:
            return
        assert any(name in text for name in names), text
        assert len(text) < 2000

    run()
    print(dict(tried))


if __name__ == "__main__":
    (arguments if sys.argv[1] == "arguments" else main)(int(sys.argv[-2]), int(sys.argv[-1]))
