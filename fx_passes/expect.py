"""What SUS can gain on a model before anything trains: attention's share of a step, and times on this device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fx_passes.ops.functional import sus_attention
from fx_passes.state import as_int, check_c, shown

_aten = torch.ops.aten
_LONGEST = 16384  # keys: no attention of more is timed
_CALLS = 5
_SOFTMAXES = {_aten._softmax, _aten._safe_softmax}  # the latter is the library's own, with dropout on a CPU


@dataclass(frozen=True)
class AttentionCall:
    """Shapes of one attention: query [batch, heads, queries, head_dim], key [batch, key_heads, keys, head_dim]."""

    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool
    fused: bool  # a library's kernel, whose backward computes the scores again
    dtype: torch.dtype
    device: str

    @property
    def flops(self) -> float:
        """Of the forward: two products of queries x keys x head_dim; causal ones take about half of the pairs."""
        pairs = self.queries * self.keys * (0.5 if self.causal else 1.0)
        return 4.0 * self.batch * self.heads * pairs * self.head_dim

    @property
    def backward_flops(self) -> float:
        return self.flops * (2.5 if self.fused else 2.0)


@dataclass
class Expectation:
    """What to expect of SUS on one model and input.

    Attributes:
        calls: the attentions that one forward computed. Softmax that is written out as exp and sum is not among them.
        other_flops: floating point operations of all other matrix products and convolutions of one forward.
        forward_seconds: of one forward in eager mode, on the device it ran on.
    """

    calls: list[AttentionCall]
    other_flops: float
    forward_seconds: float
    _known: dict[tuple[float, int], float | None] = field(default_factory=dict)

    @property
    def keys(self) -> int:
        """The largest number of keys of an attention."""
        return max((call.keys for call in self.calls), default=0)

    @property
    def backward_share(self) -> float:
        """Attention's backward in the operations of a training step, forward and backward; 0 to 1."""
        backward = sum(call.backward_flops for call in self.calls)
        step = 3 * self.other_flops + sum(call.flops for call in self.calls) + backward
        return backward / step if step else 0.0

    @property
    def largest_speedup(self) -> float:
        """Of a step if attention's backward were free, by operations."""
        return 1 / (1 - self.backward_share)

    def speedup(self, c: float, times: int = 1) -> float | None:
        """Predicted speed-up of a step's forward and backward on this device; None where it cannot be timed.

        Attention is timed here, once, on random queries and keys: diffuse, the worst case for SUS. All else takes
        three times what it took in the forward. Both are eager: no compiler fuses anything.

        Args:
            c: expected number of kept entries per row, above 0.
            times: of the input's length: 4 predicts for inputs four times as long.

        Raises:
            TypeError, ValueError: an argument is not allowed; the message names it.
        """
        c = check_c(c)
        number = as_int(times)
        if number is None:
            raise TypeError(f"times must be an int of at least 1, but it is {shown(times)}")
        if number < 1:
            raise ValueError(f"times must be at least 1, but it is {shown(times)}")
        times = number
        if (c, times) not in self._known:
            self._known[c, times] = self._predict(c, times)
        return self._known[c, times]

    def _predict(self, c: float, times: int) -> float | None:
        if not self.calls or self.keys * times > _LONGEST:
            return None
        forward = sum(_seconds(call, None, 1).forward for call in self.calls)
        other = 3 * max(0.0, self.forward_seconds - forward) * times
        exact = sum(_seconds(call, None, times).step for call in self.calls)
        sus = sum(_seconds(call, c, times).step for call in self.calls)
        return (other + exact) / (other + sus)

    def __str__(self) -> str:
        if not self.calls:
            return "No attention was seen in a forward: nothing is expected of SUS."
        lines = [
            f"attention's backward is {self.backward_share:.1%} of a training step's operations at n = {self.keys}; "
            f"if it were free, a step would be {self.largest_speedup:.2f}x as fast"
        ]
        for times in (1, 4):
            found = {c: self.speedup(c, times) for c in (30.0, 100.0)}
            said = ", ".join(f"{x:.2f}x at c = {c:g}" for c, x in found.items() if x is not None)
            n = self.keys * times
            lines.append(f"predicted for this device, n = {n}: {said or f'not timed above {_LONGEST} keys'}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Product:
    first: tuple[int, ...]  # shape of the first factor
    out: tuple[int, ...]
    flops: float
    dtype: torch.dtype
    device: str


class CountAttention(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, the attentions and the operations of all matrix products and convolutions are counted.

    Attributes:
        calls: the attentions.
        other_flops: of what is none.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import flop_registry  # it imports Triton

        super().__init__()  # type: ignore[no-untyped-call]
        self._flops_of = flop_registry
        self._fused: list[AttentionCall] = []
        self._products: list[_Product] = []
        self._softmaxes: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = getattr(func, "overloadpacket", None)
        if packet in _fused_attentions():
            self._fused.append(_fused_call(func, args, kwargs))
        elif packet in _SOFTMAXES and args[0].dim() >= 3:
            self._softmaxes.append(tuple(args[0].shape))
        elif packet in self._flops_of:
            flops = float(self._flops_of[packet](*args, **kwargs, out_val=out))
            tensors = [a for a in args if isinstance(a, Tensor)]
            first = tensors[1] if packet in (_aten.addmm, _aten.baddbmm) else tensors[0]
            self._products.append(_Product(tuple(first.shape), tuple(out.shape), flops, out.dtype, str(out.device)))
        return out

    @property
    def calls(self) -> list[AttentionCall]:
        return [*self._fused, *(call for call, _ in self._by_hand().values())]

    @property
    def other_flops(self) -> float:
        inside = {i for _, products in self._by_hand().values() for i in products}
        return sum(product.flops for i, product in enumerate(self._products) if i not in inside)

    def _by_hand(self) -> dict[int, tuple[AttentionCall, tuple[int, int]]]:
        """By softmax, the attention around it: a product that gives its scores, and one that takes its weights."""
        found: dict[int, tuple[AttentionCall, tuple[int, int]]] = {}
        used: set[int] = set()
        for number, shape in enumerate(self._softmaxes):
            same = (math.prod(shape), shape[-2:])
            free = [(i, p) for i, p in enumerate(self._products) if i not in used]
            scores = next((i for i, p in free if (math.prod(p.out), p.out[-2:]) == same), None)
            values = next((i for i, p in free if (math.prod(p.first), p.first[-2:]) == same), None)
            if scores is None or values is None:
                continue
            used |= {scores, values}
            product, heads = self._products[scores], shape[-3]
            found[number] = (
                AttentionCall(
                    batch=math.prod(shape[:-3]),
                    heads=heads,
                    key_heads=heads,
                    queries=shape[-2],
                    keys=shape[-1],
                    head_dim=product.first[-1],
                    causal=False,
                    fused=False,
                    dtype=product.dtype,
                    device=product.device,
                ),
                (scores, values),
            )
        return found


@lru_cache(maxsize=1)
def _fused_attentions() -> frozenset[Any]:
    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    packets = (getattr(_aten, f"_scaled_dot_product_{name}", None) for name in names)
    return frozenset(p for p in packets if p is not None)


def _fused_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AttentionCall:
    given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    q, k = given["query"], given["key"]
    return AttentionCall(
        batch=q.shape[0],
        heads=q.shape[1],
        key_heads=k.shape[1],
        queries=q.shape[2],
        keys=k.shape[2],
        head_dim=q.shape[3],
        causal=bool(given.get("is_causal", False)),
        fused=True,
        dtype=q.dtype,
        device=str(q.device),
    )


def expect(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Expectation | None:
    """Runs two forwards without gradients, counts, and times the second; None where the model cannot be run so.

    Buffers of a module and the random generators are put back afterwards.
    """
    run = model.forward if isinstance(model, nn.Module) else model
    try:
        with _unchanged(model), torch.no_grad():
            with CountAttention() as count:
                run(*args, **kwargs)  # on a CPU the first one can take three times as long
            start = _now()
            run(*args, **kwargs)
            seconds = _now() - start
        return Expectation(count.calls, count.other_flops, seconds)
    except Exception:  # whatever a stranger's forward does without gradients: it is an extra
        return None


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    saved = [b.detach().clone() for b in buffers]
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        yield
    with torch.no_grad():
        for buffer, value in zip(buffers, saved, strict=True):
            if not torch.equal(buffer, value):
                buffer.copy_(value)


@dataclass(frozen=True)
class _Times:
    forward: float
    step: float  # forward and backward


@lru_cache(maxsize=256)
def _seconds(call: AttentionCall, c: float | None, times: int) -> _Times:
    """Of one attention on this device; `c` None is the library's. Timed on some of its heads, which cost the same."""
    device = torch.device(call.device)
    parallel = torch.get_num_threads() if device.type == "cpu" else 64
    group = call.heads // call.key_heads
    heads = min(call.heads, group * max(1, math.ceil(parallel / group)))
    q = torch.randn(1, heads, call.queries * times, call.head_dim, dtype=call.dtype, device=device, requires_grad=True)
    k, v = (
        torch.randn(
            1, heads // group, call.keys * times, call.head_dim, dtype=call.dtype, device=device
        ).requires_grad_()
        for _ in range(2)
    )
    grad = torch.randn_like(q)

    def forward() -> Tensor:
        causal, gqa = call.causal, group > 1
        if c is not None:
            return sus_attention(q, k, v, is_causal=causal, enable_gqa=gqa, c=c)
        if call.fused:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)
        return torch.softmax(q @ k.mT * call.head_dim**-0.5, -1) @ v

    measured = []
    for i in range(_CALLS + 1):
        start = _now(device)
        out = forward()
        middle = _now(device)
        torch.autograd.grad(out, (q, k, v), grad)
        if i:  # the first one builds, and warms up
            measured.append((middle - start, _now(device) - start))
    whole = call.batch * call.heads / heads
    return _Times(*(whole * median(parts) for parts in zip(*measured, strict=True)))


def _now(device: torch.device | None = None) -> float:
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()
