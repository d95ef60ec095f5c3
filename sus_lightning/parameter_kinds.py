"""Which part of a model a parameter belongs to: its kind (q, k, v, o, qkv, rest) and its layer, from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("q", "k", "v", "o", "qkv", "rest")
ATTENTION_KINDS = KINDS[:-1]

# Components of parameter names as transformers, timm, torch, fairseq, nanoGPT and Llama's own code write them.
_BY_COMPONENT = {
    "q": {"q", "q_proj", "query", "query_proj", "wq", "to_q", "q_lin", "q_linear", "q_proj_weight", "linear_q"},
    "k": {"k", "k_proj", "key", "key_proj", "wk", "to_k", "k_lin", "k_linear", "k_proj_weight", "linear_k"},
    "v": {"v", "v_proj", "value", "value_proj", "wv", "to_v", "v_lin", "v_linear", "v_proj_weight", "linear_v"},
    "o": {"o", "o_proj", "out_proj", "output_proj", "wo", "to_out", "out_lin", "linear_out"},
    "qkv": {"qkv", "qkv_proj", "c_attn", "in_proj_weight", "in_proj_bias", "in_proj", "wqkv", "to_qkv"}
    | {"query_key_value", "attn_qkv"},
}
_KIND_OF = {component: kind for kind, components in _BY_COMPONENT.items() for component in components}
# "proj", "dense", "c_proj" are the output projection inside an attention, and something else in an MLP.
_OUTPUT_IN_ATTENTION = {"proj", "dense", "c_proj", "out", "output"}
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# These interleave q, k and v per head: rows cannot be told apart without the number of heads.
_INTERLEAVED = {"query_key_value"}
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")


@dataclass(frozen=True)
class Piece:
    """A parameter, or one of the three equal parts of a fused qkv parameter.

    Attributes:
        index: of the parameter in the list that was classified.
        kind: "q", "k", "v", "o", "qkv" (fused and not recognisable) or "rest".
        layer: name up to and with its first number, such as "model.layers.3"; "" if there is none.
        dim: dimension along which a fused parameter is split, or None.
        part: 0, 1 or 2 of a fused parameter.
    """

    index: int
    kind: str
    layer: str
    dim: int | None = None
    part: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.dim is None else tensor.chunk(3, self.dim)[self.part]


def clean_name(name: str) -> str:
    """A parameter's name without the prefixes that torch.compile, FSDP and activation checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def classify(named: Iterable[tuple[str, torch.Size]]) -> list[Piece]:
    """The pieces of parameters, given as names and shapes.

    Examples:
        >>> import torch.nn as nn
        >>> layer = nn.TransformerEncoderLayer(8, 2)
        >>> [piece.kind for piece in classify((n, p.shape) for n, p in layer.named_parameters())][:8]
        ['q', 'k', 'v', 'q', 'k', 'v', 'o', 'o']
    """
    pieces = []
    for index, (name, shape) in enumerate(named):
        kind, dim = _kind(clean_name(name), shape)
        layer = _layer(clean_name(name))
        if dim is None:
            pieces.append(Piece(index, kind, layer))
        else:
            pieces.extend(Piece(index, part_kind, layer, dim, part) for part, part_kind in enumerate("qkv"))
    return pieces


def _layer(name: str) -> str:
    components = name.split(".")
    for i, component in enumerate(components):
        if component.isdigit():
            return ".".join(components[: i + 1])
    return ""


def _kind(name: str, shape: torch.Size) -> tuple[str, int | None]:
    components = name.lower().split(".")
    for i in range(len(components) - 1, -1, -1):
        component = components[i]
        kind = _KIND_OF.get(component)
        if kind == "qkv":
            return _fused(component, name, shape)
        if kind is not None:
            return kind, None
        if component in _OUTPUT_IN_ATTENTION and _ATTENTION.search(".".join(components[:i])):
            return "o", None
    return "rest", None


def _fused(component: str, name: str, shape: torch.Size) -> tuple[str, int | None]:
    if component in _INTERLEAVED:
        return "qkv", None
    if len(shape) == 1:
        return ("qkv", 0) if shape[0] % 3 == 0 else ("qkv", None)
    if len(shape) == 2 and shape[0] == 3 * shape[1]:
        return "qkv", 0
    if len(shape) == 2 and shape[1] == 3 * shape[0]:  # transformers' Conv1D has [in, out]
        return "qkv", 1
    return "qkv", None
