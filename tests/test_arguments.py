"""Every public function and class of fx_passes with a wrong argument: one error that names it, before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fx_passes import SUSBackend, backend, explain, sus_attention, sus_backward
from fx_passes.expect import Expectation
from fx_passes.ops import functional
from fx_passes.state import State

try:  # before a test replaces what it imports
    from fx_passes import huggingface as _huggingface
except ImportError:
    _huggingface = None  # type: ignore[assignment]

HUGE = 10**400
X = torch.ones(1, 2, 4, 8)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NO_NUMBER = ["30", None, True, np.True_, 1j, [], (), {}, Unprintable(), torch.ones(2), torch.ones(1), X.to("meta")]
NO_C = [*NO_NUMBER, 0, -1, -math.inf, math.nan, HUGE, torch.tensor(0.0), torch.tensor(math.nan)]
NO_SEED = ["1", True, np.True_, 1.5, np.float32(2), torch.tensor([2]), 1j, [], Unprintable(), 1 << 64, -(1 << 63) - 1]
NO_CHOICE = ["", "x", "AUTO", None, 3, True, [], {}, Unprintable(), torch.ones(2)]
NO_TENSOR = ["x", None, 3, [[1.0]], Unprintable()]
NO_FLOATS = [*NO_TENSOR, X.int(), X.bool(), X.to(torch.complex64), X.to_sparse(), torch.ones(8), torch.ones(())]
NO_IDS = [
    "x",
    3,
    [0, 0, 1, 1],
    Unprintable(),
    torch.ones(4),
    torch.zeros(3).long(),
    torch.zeros(()).long(),
    torch.zeros(4, device="meta").long(),
    torch.zeros(4).long().to_sparse(),
    torch.zeros(2, 4).long(),
]
NO_FLAG = ["x", None, 1, 0.0, [], torch.ones(())]
ATTENTION: dict[str, list[Any]] = {
    "query": [*NO_FLOATS, X[..., :5], X.double(), X.to("meta")],
    "key": [*NO_FLOATS, X[..., :5], X.double(), X.to("meta"), X[:, :1], X[0]],
    "value": [*NO_FLOATS, X[..., :3, :], X.double(), X.to("meta"), X[:, :1], X[0]],
    "attn_mask": ["x", 3, [[1.0]], Unprintable(), X.int(), torch.ones(5, 4), torch.ones(4, 4, device="meta"),
                  torch.eye(4).to_sparse(), torch.ones(4, 4, dtype=torch.complex64), torch.ones(1, 1, 1, 4, 4)],
    "dropout_p": [*NO_NUMBER, -0.1, 1.0, 1, math.nan, math.inf, HUGE],
    "is_causal": NO_FLAG,
    "scale": [x for x in NO_NUMBER if x is not None] + [math.nan, math.inf, -math.inf, HUGE],
    "enable_gqa": NO_FLAG,
    "query_ids": NO_IDS,
    "key_ids": NO_IDS,
    "c": [*NO_C, torch.tensor(True), torch.tensor(1j)],
    "sampler": [*NO_CHOICE, "block"],
    "seed": [*NO_SEED, torch.ones(()), torch.tensor([1]), torch.tensor(True), torch.zeros((), device="meta").long()],
    "forward": NO_CHOICE,
    "state": ["x", None, True, 1.0, [], Unprintable(), 99999, -1, HUGE, torch.tensor(1)],
}  # fmt: skip
OBJECT = {"c": NO_C, "sampler": [*NO_CHOICE, "block"], "seed": NO_SEED, "forward": NO_CHOICE}
FORMS: dict[str, tuple[Callable[..., Any], dict[str, list[Any]]]] = {
    "sus_attention": (lambda **given: sus_attention(**{"query": X, "key": X, "value": X, **given}), ATTENTION),
    "sus_backward": (sus_backward, OBJECT),
    "sus_backward.c": (lambda c: setattr(sus_backward(), "c", c), {"c": NO_C}),
    "SUSBackend": (SUSBackend, {**OBJECT, "compiler": NO_CHOICE}),
    'torch.compile(backend="sus")': (
        lambda **options: backend.sus(None, [], options=options),  # type: ignore[arg-type]
        {**OBJECT, "compiler": NO_CHOICE, "unknown": [3]},
    ),
    "Expectation.speedup": (
        lambda **given: Expectation([], 1.0, 1.0).speedup(**{"c": 3.0, **given}),
        {"c": NO_C, "times": [*NO_SEED[:6], None, 0, -1]},
    ),
    "SUSBackend.c": (lambda c: setattr(SUSBackend(), "c", c), {"c": NO_C}),
    "SUSBackend.register": (SUSBackend().register, {"name": ["", "a b", "inductor", None, 3, [], Unprintable()]}),
    "explain": (lambda model: explain(model, X), {"model": ["x", None, 3, X, Unprintable()]}),
    "register_sus_attention": (lambda **given: huggingface().register_sus_attention(**given), OBJECT),
    "SUSTrainerCallback": (
        lambda **given: huggingface().SUSTrainerCallback(**given),
        {**OBJECT, "c": [*NO_C, {3: 4.0}, {"x": 1.0}, {0: -1}, {0: 1.0, "x": 2.0}], "compiler": NO_CHOICE},
    ),
    "State": (
        lambda **given: State(**{"c": 1.0, **given}),
        {"c": NO_C, "seed": NO_SEED, "counter": [*NO_SEED, None, -1, 1 << 63]},
    ),
    "State.resume": (
        lambda **given: State(1.0).resume(**{"counter": 0, "number": 0, **given}),
        {"counter": [*NO_SEED, None, -1], "number": [*NO_SEED, -1]},
    ),
}


def huggingface() -> Any:
    pytest.importorskip("transformers")
    return _huggingface


def names(argument: str) -> tuple[str, ...]:
    return {"key": ("key", "head_dim"), "query": ("query", "key", "value")}.get(argument, (argument,))


@pytest.mark.parametrize(
    ("form", "argument"), [(form, argument) for form, (_, bad) in FORMS.items() for argument in bad]
)
def test_one_error_that_names_the_argument(form: str, argument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(functional, "draw", work)
    monkeypatch.setattr(functional, "attend", work)
    call, bad = FORMS[form]
    for value in bad[argument]:
        with pytest.raises((TypeError, ValueError)) as raised:
            call(**{argument: value})
        text = str(raised.value)
        assert any(name in text for name in names(argument)), text
        assert "\n" not in text, text
        assert len(text) < 600, text


def test_a_bad_setting_changes_nothing() -> None:
    for made in (sus_backward(3), SUSBackend(3)):
        for c in NO_C:
            with pytest.raises((TypeError, ValueError)):
                made.c = c
        assert made.c == 3.0


def test_states_are_numbers_of_states_that_exist() -> None:
    state, x = State(2.0), X.clone().requires_grad_()
    sus_attention(x, x, x, c=2, state=state.id, sampler="systematic").sum().backward()
    assert state.kept.rows == 8


class Index:
    """An integer of another library."""

    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), Index()])
def test_integers_of_other_libraries(three: Any) -> None:
    q = torch.randn(1, 2, 40, 8, requires_grad=True)
    grads = [torch.autograd.grad(sus_attention(q, q, q, c=2, seed=seed).sum(), q)[0] for seed in (3, three)]
    assert torch.equal(*grads)
    state = State(5.0, three, three)
    assert (state.seed, state.counter) == (3, 3)
    state.set_site_c({three: np.float32(2)})
    assert state.site_c == {3: 2.0}
    for make in (SUSBackend, sus_backward):
        assert type(make(seed=three).state.seed) is int
    state.resume(three, three)
    assert state.counter == 3


@pytest.mark.parametrize("two", [2, np.float32(2), np.float64(2), np.int64(2), torch.tensor(2), torch.tensor(2.0)])
def test_c_is_a_number_or_a_tensor_without_dimensions(two: Any) -> None:
    q = torch.randn(1, 2, 40, 8, requires_grad=True)
    grads = [torch.autograd.grad(sus_attention(q, q, q, c=c, seed=3).sum(), q)[0] for c in (2.0, two)]
    assert torch.equal(*grads)
    assert sus_backward(two).c == SUSBackend(two).c == State(two).c == 2.0
