"""Which arguments `sus_attention` takes, and which calls of F.scaled_dot_product_attention can have a SUS backward."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fx_passes.device_state import signed
from fx_passes.ops.problem import FORWARDS, SAMPLERS
from fx_passes.state import as_int, check_c, check_seed, get_state, shown

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if name == "sampler" and value == "block":
        raise ValueError("sampler 'block' is gone: use 'tile', which keeps whole tiles of 64 rows and 64 keys")
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, but it is {shown(value)}")


def check_state(state: Any) -> int:
    """The number of a `State` that exists, or 0; TypeError or ValueError otherwise."""
    number = as_int(state)
    if number is None:
        raise TypeError(f"state must be the number of a State (its id) or 0, but it is {shown(state)}")
    if number and get_state(number) is None:
        raise ValueError(f"state must be the number of a State that exists (its id) or 0, but it is {shown(state)}")
    return number


def autocast_dtype(x: Tensor, device: str) -> torch.dtype:
    """The dtype with which autocast hands a tensor to F.scaled_dot_product_attention."""
    if x.is_floating_point() and x.dtype != torch.float64 and autocasts(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; there are types that it does not know."""
    known = device in _DEVICES or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def as_c(c: float | Tensor, query: Tensor) -> Tensor:
    """c as a 0-dim float64 tensor on the query's device.

    Raises:
        TypeError, ValueError: it is not a number above 0; of a tensor on a GPU, only its kind is looked at.
    """
    if not isinstance(c, Tensor):
        # Filled on the device: a copy from the host would wait for it.
        return torch.full((), check_c(c), dtype=torch.float64, device=query.device)
    if c.dim() != 0:
        raise ValueError(f"c must be a number or a 0-dim tensor, but it is a tensor of shape {tuple(c.shape)}")
    if c.is_complex() or c.dtype == torch.bool:
        raise TypeError(f"c must be a real number, but it is a tensor of {c.dtype}")
    _check_scalar_device("c", c, query)
    if c.device.type == "cpu" and not torch.compiler.is_compiling():
        check_c(c)
    return c.detach().to(query.device, torch.float64, copy=True)  # whoever has it may write to it


def as_seed(seed: int | Tensor, query: Tensor) -> Tensor:
    """A seed as a 0-dim int64 tensor on the query's device.

    Raises:
        TypeError, ValueError: it is not an int of 64 bits.
    """
    if not isinstance(seed, Tensor):
        number = check_seed(seed, "an int, a 0-dim int64 tensor or None")
        assert number is not None
        return torch.full((), signed(number), dtype=torch.int64, device=query.device)
    if seed.dtype != torch.int64:
        raise TypeError(f"seed must be an int or an int64 tensor, but it is a tensor of {seed.dtype}")
    if seed.dim() != 0:
        raise ValueError(f"seed must be an int or a 0-dim tensor, but it is a tensor of shape {tuple(seed.shape)}")
    _check_scalar_device("seed", seed, query)
    return seed.to(query.device, copy=True)


def _check_scalar_device(name: str, x: Tensor, query: Tensor) -> None:
    if x.device != query.device and x.device.type != "cpu":
        raise ValueError(f"{name} must be on the query's device {query.device} or on the CPU, but it is on {x.device}")


def check_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    sampler: str,
    forward: str,
) -> None:
    """Raises TypeError or ValueError with the argument of `sus_attention`, what was given and what is allowed."""
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("forward", forward, FORWARDS)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
    device = query.device.type
    dtype = autocast_dtype(query, device)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dtype not in _FLOATS or autocast_dtype(x, device) != dtype:
            allowed = "float64, float32, bfloat16 or float16, the same for query, key and value"
            raise TypeError(f"{name} must be {allowed}, but it is {x.dtype} (query is {query.dtype})")
        if x.dim() < 2 or x.dim() != query.dim():
            raise ValueError(
                f"{name} must have as many dimensions as query, at least 2, but it is {tuple(x.shape)} "
                f"and query is {tuple(query.shape)}"
            )
        if x.device != query.device:
            raise ValueError(f"{name} must be on the query's device {query.device}, but it is on {x.device}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have the query's head_dim {query.shape[-1]}, but it is {tuple(key.shape)}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have as many keys as key, {key.shape[-2]}, but it is {tuple(value.shape)}")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, but it is {shown(flag)}")
    _check_heads(query, key, value, enable_gqa)
    _check_real("dropout_p", dropout_p)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), but it is {shown(dropout_p)}")
    if scale is not None:
        _check_real("scale", scale)
        if query.shape[-1] and not math.isfinite(scale):
            raise ValueError(f"scale must be finite or None, but it is {shown(scale)}")
    if attn_mask is not None:
        _check_mask(query, key, attn_mask, is_causal)


def check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is {shown(x)}")
    if x.is_nested or x.layout != torch.strided:
        kind = "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"{name} must be a dense tensor, but it is {kind}")


def _check_real(name: str, value: Any) -> None:
    if not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but it is {shown(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a float, but it is {shown(value)}") from None


def _check_heads(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    if query.dim() < 3:
        return
    heads, groups = query.shape[-3], key.shape[-3]
    if groups != value.shape[-3]:
        raise ValueError(f"value must have as many heads as key, {groups}, but it is {tuple(value.shape)}")
    if heads != groups and not (enable_gqa and groups > 0 and heads % groups == 0):
        allowed = f"a divisor of {heads}" if enable_gqa else f"{heads} (or set enable_gqa=True)"
        raise ValueError(f"the number of key heads must be {allowed}, but it is {groups}")
    try:
        broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        raise ValueError(
            f"the batch dimensions of query, key and value do not fit: {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        ) from None


def _check_mask(query: Tensor, key: Tensor, attn_mask: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("attn_mask and is_causal=True exclude one another: put the causal mask into attn_mask")
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in _FLOATS:
        raise TypeError(f"attn_mask must be bool or floating point, but it is {attn_mask.dtype}")
    if attn_mask.device != query.device:
        raise ValueError(f"attn_mask must be on the query's device {query.device}, but it is on {attn_mask.device}")
    full = (*query.shape[:-1], key.shape[-2])
    if not _broadcasts(attn_mask, full):
        raise ValueError(f"attn_mask must be broadcastable to {full}, but it is {tuple(attn_mask.shape)}")


def broadcast(*shapes: torch.Size) -> torch.Size:
    return torch.broadcast_shapes(*shapes)  # type: ignore[no-any-return, no-untyped-call]


def _broadcasts(mask: Tensor, full: tuple[int, ...]) -> bool:
    sizes = zip(mask.shape[::-1], full[::-1])  # noqa: B905 - Dynamo of torch 2.8 takes strict=False for True
    return mask.dim() <= len(full) and all(size in (1, target) for size, target in sizes)


def why_left(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> str | None:
    """Why a call of F.scaled_dot_product_attention stays with the library, or None if `attend` can take it over.

    It raises nothing: what is wrong about a call, the library's own function says.
    """
    tensors = [query, key, value] if attn_mask is None else [query, key, value, attn_mask]
    for reason in map(_unusual, tensors):
        if reason is not None:
            return reason
    if any(x.device != query.device for x in tensors) or query.device.type not in _DEVICES:
        return f"device {query.device.type}" if query.device.type not in _DEVICES else "tensors on several devices"
    device = query.device.type
    dtypes = {autocast_dtype(x, device) for x in tensors[:3]}
    if len(dtypes) > 1 or not dtypes <= set(_FLOATS):
        return "dtypes " + ", ".join(sorted(str(d) for d in dtypes))
    if type(is_causal) is not bool or type(enable_gqa) is not bool:
        return "is_causal or enable_gqa is not a bool"
    if not _is_number(dropout_p) or not 0 <= dropout_p < 1:
        return "dropout_p outside of [0, 1)"
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        return "scale is no finite int or float"
    return _why_shapes(query, key, value, enable_gqa) or _why_mask(query, key, value, attn_mask, is_causal)


def _is_number(x: Any) -> bool:
    """Also NumPy's float64, which is a float. Not by `numbers.Real`, which Dynamo does not trace."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _unusual(x: Any) -> str | None:
    """Why a tensor is none that the operator reads, or None."""
    if not isinstance(x, Tensor):
        return "an argument is no tensor"
    if x.is_nested:
        return "a nested tensor"
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return f"a tensor of the class {type(x).__name__}"
    if x.layout != torch.strided:
        return f"a tensor of layout {x.layout}"
    if not torch.compiler.is_dynamo_compiling() and x.is_inference():
        return "an inference tensor"
    return None


def _why_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> str | None:
    shapes = f"shapes {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
    ranks = (query.dim(), key.dim(), value.dim())
    if min(ranks) < 2 or (ranks[0] < 3 and max(ranks) > 2) or (ranks[0] > 2 and min(ranks) < 3):
        return shapes
    if max(ranks) > ranks[0] or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return shapes
    if 0 in (*query.shape, *key.shape, *value.shape):
        return "empty tensors"
    if ranks[0] == 2:
        return None
    heads, groups = query.shape[-3], key.shape[-3]
    if groups != value.shape[-3] or not (groups in (1, heads) or (enable_gqa and heads % groups == 0)):
        return shapes
    if enable_gqa and min(ranks) != ranks[0]:
        return shapes
    try:
        broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    except RuntimeError:
        return shapes
    return None


def _why_mask(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> str | None:
    if attn_mask is None:
        return None
    if is_causal:
        return "attn_mask with is_causal"
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in (query.dtype, torch.float32):
        return f"attn_mask of {attn_mask.dtype}"
    batch = () if query.dim() == 2 else broadcast(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    if attn_mask.dim() < 2 or not _broadcasts(attn_mask, (*batch, *query.shape[-3:-1], key.shape[-2])):
        return f"attn_mask of shape {tuple(attn_mask.shape)}"
    return None
