"""Bad input to `sus_attention`: one error that names the argument, what was given and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fx_passes import sus_attention

Q = torch.randn(2, 4, 10, 8)

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"c": 0}, ValueError, r"c must be above 0 .*0\.0"),
    ({"c": -3.0}, ValueError, r"c must be above 0 .*-3"),
    ({"c": float("nan")}, ValueError, r"c must be above 0 .*nan"),
    ({"c": "many"}, TypeError, r"c must be a number .*'many'"),
    ({"c": torch.ones(2)}, ValueError, r"c must be .*0-dim.*\(2,\)"),
    ({"c": torch.tensor(0.0)}, ValueError, r"c must be above 0"),
    ({"sampler": "dense"}, ValueError, r"sampler must be one of 'auto', 'sys.*dependent'.*'dense'"),
    ({"forward": "mine"}, ValueError, r"forward must be one of 'auto', 'library'.*'mine'"),
    ({"c": "30"}, TypeError, r"c must be a number .*'30'"),
    ({"c": True}, TypeError, r"c must be a number .*True"),
    ({"c": 3j}, TypeError, r"c must be a number .*3j"),
    ({"c": 10**400}, ValueError, r"c must fit into a float"),
    ({"c": None}, TypeError, r"c must be a number .*None"),
    ({"c": torch.tensor(3j)}, TypeError, r"c must be a real number.*complex64"),
    ({"c": torch.tensor(True)}, TypeError, r"c must be a real number.*bool"),
    ({"c": torch.tensor(3.0, device="meta")}, ValueError, r"c must be on the query's device cpu.*meta"),
    ({"seed": 1.5}, TypeError, r"seed must be an int.*1\.5"),
    ({"seed": True}, TypeError, r"seed must be an int.*True"),
    ({"seed": 1 << 70}, ValueError, r"seed must be in"),
    ({"seed": torch.tensor(1.0)}, TypeError, r"seed must be .*int64.*float32"),
    ({"seed": torch.tensor(True)}, TypeError, r"seed must be .*int64.*bool"),
    ({"seed": torch.tensor([1])}, ValueError, r"seed must be .*0-dim.*\(1,\)"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, r"seed must be on the query's device cpu.*meta"),
    ({"query": [[1.0]]}, TypeError, r"query must be a tensor"),
    ({"query": Q.to_sparse()}, TypeError, r"query must be a dense tensor.*sparse"),
    ({"key": Q.to("meta")}, ValueError, r"key must be on the query's device cpu.*meta"),
    ({"value": Q.to("meta")}, ValueError, r"value must be on the query's device cpu.*meta"),
    ({"attn_mask": torch.ones(10, 10, device="meta")}, ValueError, r"attn_mask must be on the query's device.*meta"),
    ({"attn_mask": torch.eye(10).to_sparse()}, TypeError, r"attn_mask must be a dense tensor.*sparse"),
    ({"attn_mask": [[True]]}, TypeError, r"attn_mask must be a tensor"),
    ({"dropout_p": "x"}, TypeError, r"dropout_p must be a number.*'x'"),
    ({"dropout_p": None}, TypeError, r"dropout_p must be a number.*None"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p must be in \[0, 1\).*nan"),
    ({"scale": "x"}, TypeError, r"scale must be a number.*'x'"),
    ({"scale": True}, TypeError, r"scale must be a number.*True"),
    ({"scale": 10**400}, ValueError, r"scale must fit into a float"),
    ({"is_causal": 1}, TypeError, r"is_causal must be True or False.*1"),
    ({"enable_gqa": "yes"}, TypeError, r"enable_gqa must be True or False.*'yes'"),
    ({"query": Q.long()}, TypeError, r"query must be float64.*int64"),
    ({"query": Q[..., 0, 0, 0]}, ValueError, r"query must have .*at least 2"),
    ({"key": Q.double()}, TypeError, r"key must be .*the same for query, key and value.*float64"),
    ({"key": Q[0]}, ValueError, r"key must have as many dimensions as query"),
    ({"key": Q[..., :4]}, ValueError, r"key must have the query's head_dim 8.*\(2, 4, 10, 4\)"),
    ({"value": Q[:, :, :5]}, ValueError, r"value must have as many keys as key, 10"),
    ({"value": Q[:, :2]}, ValueError, r"value must have as many heads as key, 4"),
    ({"key": Q[:, :2], "value": Q[:, :2]}, ValueError, r"number of key heads must be 4 \(or set enable_gqa=True\).*2"),
    ({"key": Q[:, :3], "value": Q[:, :3], "enable_gqa": True}, ValueError, r"must be a divisor of 4.*3"),
    ({"key": Q[[0, 0, 0]], "value": Q[[0, 0, 0]]}, ValueError, r"batch dimensions .*do not fit"),
    ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\).*1\.0"),
    ({"scale": float("inf")}, ValueError, r"scale must be finite"),
    (
        {"attn_mask": torch.ones(10, 9, dtype=torch.bool)},
        ValueError,
        r"attn_mask must be broadcastable to \(2, 4, 10, 10\)",
    ),
    (
        {"attn_mask": torch.ones(10, 10, dtype=torch.long)},
        TypeError,
        r"attn_mask must be bool or floating point.*int64",
    ),
    ({"attn_mask": torch.ones(10, 10), "is_causal": True}, ValueError, r"attn_mask and is_causal=True exclude"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sus_attention(**{"query": Q, "key": Q, "value": Q, "c": 5.0, **change})


def test_c_is_read_when_the_call_runs() -> None:
    q, k, v = (torch.randn(1, 1, 30, 8, requires_grad=True) for _ in range(3))
    numbers, tensors = (
        torch.autograd.grad(sus_attention(q, k, v, c=c, seed=2).sum(), v)[0] for c in (4.0, torch.tensor(4.0))
    )
    assert torch.equal(numbers, tensors)


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 2, 4), torch.randn(5, 2, 4)], layout=torch.jagged)
    with pytest.raises(TypeError, match="query must be a dense tensor, but it is nested"):
        sus_attention(nested.transpose(1, 2), Q, Q, c=3)


def test_autocast_makes_dtypes_equal() -> None:
    q, k = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(2))
    v = torch.randn(1, 2, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = sus_attention(q, k, v, c=float("inf"))
        true = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, true, rtol=2e-2, atol=2e-2)


def test_a_default_device_moves_nothing() -> None:
    q = Q.clone().requires_grad_()
    with torch.device("meta"):
        sus_attention(q, q, q, is_causal=True, c=3, dropout_p=0.1).sum().backward()
        sus_attention(q.double(), q.double(), q.double(), c=3).sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_manual_seed_fixes_the_draws_and_the_generator_is_not_used() -> None:
    q, k, v = (torch.randn(1, 1, 30, 8, requires_grad=True) for _ in range(3))

    def gradient(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        (grad,) = torch.autograd.grad(sus_attention(q, k, v, c=3).sum(), v)
        assert torch.equal(before, torch.get_rng_state())
        return grad

    first, other = gradient(1), gradient(2)
    assert torch.equal(first, gradient(1))
    assert torch.equal(first, gradient(1))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("shape", [(1, 2, 20, 0), (1, 2, 0, 8), (0, 2, 20, 8), (1, 0, 20, 8)])
def test_sizes_of_zero(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, requires_grad=True)
    sus_attention(q, q, q, c=2).sum().backward()
    assert q.grad is not None
    assert q.grad.shape == shape
