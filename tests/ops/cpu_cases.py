"""Problems for the tests of the native CPU kernel, and its kept entries as tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fx_passes.ops import cpu
from fx_passes.ops.cpu import kept
from fx_passes.ops.draws import STREAM_DROPOUT, entry_words
from fx_passes.ops.problem import Gradients, Problem, Softmax, Static, Upstream
from fx_passes.ops.reference import Dense


@dataclass(frozen=True)
class Case:
    """Sizes and features of one problem; `padded` hides that many last keys of the last batch entry."""

    batch: int = 1
    heads: int = 2
    groups: int = 2
    m: int = 64
    n: int = 64
    d: int = 32
    e: int = 32
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    padded: int | None = None
    masked: str = ""  # dimensions of a random mask, such as "bhmn"
    biased: str = ""  # of a bias
    fill: float = 0.0  # the bias has it at every third place, in the last half, and, if float32 has no room for
    # scores beside it, in the first row everywhere
    prefix: int | None = None  # of the first batch entry; each next one has 300 more
    documents: int = 0  # packed one after the other, in places that differ between batch entries; 0 is no ids
    scattered: bool = False  # documents in no order
    softcap: float = 0.0
    sinks: float | None = None  # the middle one's logit
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    scale: float = 0.25

    def problem(self, seed: int = 0, **static: object) -> Problem:
        """Inputs of [batch, length, heads, width] in memory, as projections give them."""
        g = torch.Generator().manual_seed(seed)

        def make(length: int, heads: int, width: int) -> Tensor:
            x = torch.randn(self.batch, length, heads, width, generator=g)
            return x.to(self.dtype).transpose(1, 2)

        q, k, v = make(self.m, self.heads, self.d), make(self.n, self.groups, self.d), make(self.n, self.groups, self.e)
        mask = None
        if self.padded is not None:
            mask = torch.ones(self.batch, 1, 1, self.n, dtype=torch.bool)
            mask[-1, ..., self.n - self.padded :] = False
        shape = dict(zip("bhmn", (self.batch, self.heads, self.m, self.n), strict=True))
        if self.masked:
            places = torch.rand([size if name in self.masked else 1 for name, size in shape.items()], generator=g) > 0.3
            mask = places if mask is None else mask & places
        bias = None
        if self.biased:
            bias = torch.randn([size if name in self.biased else 1 for name, size in shape.items()], generator=g)
            if self.fill:
                hidden = torch.arange(bias.numel()).view(bias.shape) % 3 == 0
                hidden[:, :, 0] |= self.fill < -1e8
                hidden[..., self.n // 2 :] = True  # whole chunks, for all rows
                bias = bias.masked_fill(hidden, self.fill)
            bias = bias.to(self.dtype)
        options = {"left": self.left, "right": self.right, "bottom_right": self.bottom_right}
        options = {**options, "softcap": self.softcap, "dropout_p": self.dropout, **static}
        sinks = None if self.sinks is None else self.sinks + torch.arange(self.heads) - self.heads // 2
        query_ids = key_ids = None
        if self.documents:
            query_ids, key_ids = (
                torch.randint(self.documents, (self.batch, size), generator=g) for size in (self.m, self.n)
            )
            if not self.scattered:
                query_ids, key_ids = query_ids.sort(-1).values, key_ids.sort(-1).values
        prefix = None if self.prefix is None else self.prefix + 300 * torch.arange(self.batch, dtype=torch.int32)
        return Problem(q, k, v, mask, bias, sinks, query_ids, key_ids, prefix, Static(self.scale, **options))  # type: ignore[arg-type]

    def grad(self) -> Tensor:
        g = torch.Generator().manual_seed(99)
        return torch.randn(self.batch, self.m, self.heads, self.e, generator=g).to(self.dtype).transpose(1, 2)


CASES = {
    "one": Case(m=1, n=1),
    "ragged causal": Case(m=63, n=63, right=0),
    "causal 257": Case(m=257, n=257, right=0, d=64, e=64),
    "full 300": Case(batch=2, m=300, n=300, d=16, e=16),
    "wide": Case(m=130, n=130, d=256, e=256, right=0, scale=0.07),
    "widths differ": Case(m=100, n=90, d=48, e=112),
    "odd widths": Case(batch=2, heads=4, groups=2, m=130, n=130, d=72, e=72, right=0),
    "odd widths differ": Case(m=100, n=90, d=20, e=1, dtype=torch.bfloat16),
    "odd widths of special code": Case(m=100, n=300, d=60, e=57, biased="hn", softcap=2.0, sinks=1.0, dropout=0.1),
    "long odd widths": Case(heads=1, groups=1, m=50, n=8500, d=40, e=249, right=0, bottom_right=True),
    "gqa": Case(batch=2, heads=9, groups=3, m=120, n=120, right=0),
    "short query": Case(m=40, n=600, right=0),
    "bottom right": Case(m=40, n=600, right=0, bottom_right=True),
    "long query": Case(m=600, n=40, right=0, bottom_right=True),
    "padding": Case(batch=3, m=280, n=280, padded=77, right=0),
    "hidden chunk": Case(batch=2, m=50, n=700, padded=500),
    "all hidden": Case(batch=2, m=50, n=50, padded=50),
    "bfloat16": Case(batch=2, m=150, n=150, d=64, e=64, right=0, dtype=torch.bfloat16),
    "float16": Case(batch=2, m=150, n=150, d=64, e=64, right=0, dtype=torch.float16),
    "float16 and all else": Case(
        m=100, n=300, d=72, e=44, biased="hmn", masked="n", softcap=2.0, sinks=1.0, dropout=0.2, dtype=torch.float16
    ),
    # Beyond 8192 keys the sampler computes weights again instead of keeping them.
    "long": Case(heads=1, groups=1, m=100, n=8300, right=0, bottom_right=True, scale=0.4),
    "long padded": Case(heads=2, groups=1, m=50, n=8500, padded=5000, dtype=torch.bfloat16),
    "window": Case(m=700, n=700, left=100, right=0),
    "window of keys behind": Case(m=90, n=900, left=10, right=20, bottom_right=True),
    "mask": Case(batch=2, heads=4, groups=2, m=100, n=300, masked="bmn"),
    "mask per head": Case(m=100, n=300, masked="hn", right=0),
    "mask and padding": Case(batch=2, m=60, n=530, masked="mn", padded=300),
    "bias": Case(batch=2, heads=4, groups=2, m=100, n=300, biased="hmn", right=0),
    "bias per key": Case(batch=2, m=100, n=600, biased="bn", fill=-1e4),
    "bias of all": Case(batch=2, heads=4, groups=2, m=100, n=300, e=48, biased="bhmn", softcap=2.0, dropout=0.2),
    "bias of places": Case(batch=2, heads=4, groups=2, m=100, n=300, d=64, e=64, biased="mn", softcap=2.0, dropout=0.2),
    "bias of finite masks": Case(batch=2, m=100, n=600, biased="bmn", fill=torch.finfo(torch.float32).min),
    "bias of -1e9": Case(m=100, n=300, biased="mn", fill=-1e9),
    "bias of infinite masks": Case(m=100, n=300, biased="mn", fill=-float("inf")),
    "bias in bfloat16": Case(m=100, n=300, biased="hmn", masked="n", left=50, dtype=torch.bfloat16),
    "long bias": Case(heads=2, groups=1, m=50, n=8500, biased="hmn", masked="mn", left=6000, bottom_right=True),
    # The backward goes over the keys in several tiles, and a full row is longer than what it lists at once.
    "tiles": Case(heads=1, groups=1, m=300, n=2600, d=64, e=64, right=0, bottom_right=True),
    "tiles of other widths": Case(heads=3, groups=1, m=40, n=1900, d=80, e=112, dtype=torch.bfloat16),
    "documents": Case(batch=2, heads=4, groups=2, m=600, n=600, documents=5, right=0),
    "documents of other lengths": Case(batch=2, m=150, n=700, documents=9, padded=100, left=90, right=80),
    "scattered documents": Case(batch=2, m=150, n=700, documents=9, padded=100, left=90, right=80, scattered=True),
    "many documents": Case(heads=1, groups=1, m=60, n=8500, documents=40, dropout=0.1),
    "long documents": Case(heads=1, groups=1, m=50, n=8500, documents=3, biased="hn", dtype=torch.bfloat16),
    "prefix": Case(batch=3, heads=4, groups=2, m=400, n=400, right=0, prefix=20),
    "prefix of all entries": Case(m=100, n=700, right=-2, bottom_right=True, prefix=690),
    "prefix and all else": Case(
        batch=2, m=100, n=700, biased="hmn", masked="n", documents=2, padded=90, prefix=0, right=3, dropout=0.1
    ),
    "long prefix": Case(heads=1, groups=1, m=50, n=8500, right=0, prefix=8400),
    "softcap": Case(batch=2, heads=4, groups=2, m=270, n=270, d=64, e=64, right=0, softcap=1.5),
    "softcap and all else": Case(
        m=100, n=700, d=16, e=48, biased="hmn", masked="n", documents=2, padded=90, softcap=0.3, left=300
    ),
    "long softcap": Case(heads=1, groups=1, m=50, n=8500, right=0, bottom_right=True, softcap=2.0, biased="hn"),
    "softcap in bfloat16": Case(m=100, n=200, softcap=20.0, dtype=torch.bfloat16),
    "sinks": Case(batch=2, heads=4, groups=2, m=270, n=270, d=64, e=64, right=0, sinks=1.0),
    "sinks and all else": Case(
        batch=2, m=100, n=700, biased="hmn", masked="bmn", fill=-1e9, documents=2, softcap=2.0, left=300, sinks=-2.0
    ),
    "sinks alone": Case(batch=2, m=50, n=50, padded=50, sinks=3.0, dtype=torch.bfloat16),
    "large sinks": Case(m=50, n=300, sinks=100.0),
    "small sinks": Case(m=50, n=300, sinks=-1e9),
    "long sinks": Case(heads=1, groups=1, m=50, n=8500, right=0, bottom_right=True, sinks=8.0),
    "dropout": Case(batch=2, heads=4, groups=2, m=270, n=270, d=64, e=64, right=0, dropout=0.1),
    "much dropout": Case(m=100, n=600, d=48, e=64, dropout=0.9, dtype=torch.bfloat16),
    "dropout in windows": Case(m=700, n=700, left=77, right=33, dropout=0.5),
    "dropout and all else": Case(
        batch=2, m=100, n=700, biased="hmn", masked="bmn", fill=-1e9, documents=2, softcap=2.0, sinks=-2.0, dropout=0.3
    ),
    "dropout that drops nothing": Case(m=50, n=50, dropout=1e-11),
    "long dropout": Case(heads=2, groups=1, m=100, n=8300, right=0, bottom_right=True, scale=0.4, dropout=0.2),
    "causal 1000": Case(m=1000, n=1000, d=64, e=64, right=0, scale=0.4),
}


class Rounded(Dense):
    """Logits as float32 holds them: beside a bias of -1e9 or finfo.min nothing is left of the scores."""

    def logits(self) -> Tensor:
        logits = super().logits()
        return logits if self.attn_bias is None else logits.float().double()


def dense(problem: Problem) -> Dense:
    s = problem.static
    return Rounded(
        problem.query,
        problem.key,
        problem.value,
        problem.attn_mask,
        problem.attn_bias,
        problem.sinks,
        query_ids=problem.query_ids,
        key_ids=problem.key_ids,
        prefix=problem.prefix,
        scale=s.scale,
        left=s.left,
        right=s.right,
        bottom_right=s.bottom_right,
        softcap=s.softcap,
    )


DROPOUT_SEED = torch.tensor(0x0123456789ABCDEF)


def tensor(c: float) -> Tensor:
    """c as the operator takes it."""
    return torch.tensor(c, dtype=torch.float64)


def dropout_factor(problem: Problem, seed: Tensor = DROPOUT_SEED) -> Tensor | None:
    """Of every weight, float64 [B, H, M, N]; None without dropout."""
    (b, h, m, _), n, p = problem.query.shape, problem.key.shape[2], problem.static.dropout_p
    if not p:
        return None
    words = entry_words(seed, problem.static.site, STREAM_DROPOUT, *(torch.arange(size) for size in (b * h, m, n)))
    return (words.view(b, h, m, n) >= int(p * 2**32)).double() / (1 - p)


def draw(problem: Problem, c: float, seed: int) -> kept.Draw:
    below = int(problem.static.dropout_p * 2**32)
    return kept.Draw(c, seed, int(DROPOUT_SEED) if below else 0, below)


@dataclass(frozen=True)
class Run:
    out: Tensor
    softmax: Softmax
    cache: Tensor


def run(problem: Problem, c: float, seed: int) -> Run:
    return Run(*cpu.forward(problem, tensor(c), torch.tensor(seed), DROPOUT_SEED))


def gradients(problem: Problem, grad: Tensor, found: Run, c: float, seed: int) -> tuple[Gradients, int]:
    wanted = problem.attn_bias is not None
    upstream = Upstream(
        grad, found.out, found.softmax, found.cache, tensor(c), torch.tensor(seed), DROPOUT_SEED, wanted
    )
    result = cpu.backward(problem, upstream)
    assert result is not None
    return result


def kept_weights(problem: Problem, cache: Tensor, c: float, seed: int) -> Tensor:
    """Weights of the kept entries in a dense float64 [B, H, M, N], NaN where nothing is kept, as they are stored."""
    parts = kept.unpack(cache, problem, draw(problem, c, seed))
    assert parts is not None
    offsets, keys, weights = parts.offsets, parts.keys, parts.weights
    b, h, m, _ = problem.query.shape
    table = torch.full((b * h * m, problem.key.shape[2]), torch.nan, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(b * h * m), offsets.diff())
    assert len(torch.unique(rows * table.shape[1] + keys)) == len(keys), "an entry is listed twice"
    table[rows, keys.long()] = weights.double()
    return table.view(b, h, m, -1)
