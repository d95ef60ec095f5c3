"""Compiles every kernel of a call ahead of time, for GPUs that are not here, and says what ptxas made of it.

As a script, in a process of its own: ``python -m tests.ops.cuda.ahead 90 '{"d": 128, "dtype": "bfloat16"}'`` prints
one JSON object per kernel. The launches are the real ones, on meta tensors; a recorder takes the launches.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fx_passes.ops import tile_rule
from fx_passes.ops.cuda import attention, launch, launch_tile
from fx_passes.ops.problem import Problem, Static, Upstream

_TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Recorder:
    """Stands in for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.calls = kernel, []  # type: ignore[var-annotated]

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.calls.append(dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)


def _source(kernel: Any, call: dict[str, Any]) -> ASTSource:
    """What the launch would compile: None and 1 are constants, multiples of 16 are known to be that, if it may know."""
    signature, constants, attributes = {}, {}, {}
    declared = {p.name for p in kernel.params if p.is_constexpr}
    for index, name in enumerate(kernel.arg_names):
        x, special = call[name], not kernel.params[index].do_not_specialize
        if name in declared or x is None or (special and type(x) is int and x == 1):
            signature[name], constants[(index,)] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = "*" + _TYPES[x.dtype]
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if x >= 1 << 31 else "i32"
        aligned = isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0)
        special = special and not kernel.params[index].do_not_specialize_on_alignment
        if signature[name] != "constexpr" and special and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def variants(launches: list[tuple[Any, dict[str, Any]]]) -> dict[str, int]:
    """How often each kernel would be compiled for these launches."""
    found: dict[str, set[str]] = {}
    for kernel, call in launches:
        source = _source(kernel, call)
        key = repr((source.signature, source.constants, source.attrs, [call.get(k) for k in _OPTIONS]))
        found.setdefault(kernel.__name__, set()).add(key)
    return {name: len(keys) for name, keys in found.items()}


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def loops(sass: str) -> list[int]:
    """Instructions of each innermost loop that holds a tensor-core product: what a warp issues per step of it."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    at = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    jumps = (
        (at.get(int(m.group(1), 16)), i) for i, (_, x) in enumerate(lines) if (m := re.search(r"BRA.*?0x(\w+)", x))
    )
    spans = [(begin, end) for begin, end in jumps if begin is not None and begin < end]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [end - begin + 1 for begin, end in inner if any("MMA" in x for _, x in lines[begin : end + 1])]


def inspect(kernel: Any, call: dict[str, Any], arch: int) -> dict[str, Any]:
    options = {k: call[k] for k in _OPTIONS if k in call}
    compiled = triton.compile(_source(kernel, call), target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([_tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass)
    return {
        "kernel": kernel.__name__,
        "arch": arch,
        "registers": numbers["REG"],
        "stack": numbers["STACK"] + numbers["LOCAL"],
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0,
        "spills": sum(i.startswith(("STL", "LDL")) for i in instructions),
        "instructions": len(instructions),
        "loops": loops(sass),
        "tensor_core": {
            name: sum(i.startswith(name) for i in instructions) for name in ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")
        },
        "warps": options.get("num_warps", 4),
    }


_KERNELS = {
    launch: (
        "attention_forward",
        "count_points",
        "place_points",
        "attention_columns",
        "attention_rows",
        "attention_delta",
    ),
    launch_tile: ("tile_rows", "tile_probe", "tile_dq", "tile_dkdv", "tile_sums", "tile_columns"),
}


def record(
    n: int = 32768, heads: int = 8, groups: int = 8, d: int = 128, dtype: str = "bfloat16", c: float = 30.0,
    sampler: str = "systematic", features: tuple[str, ...] = ("causal",), arch: int = 90, site: int = 0,
) -> list[tuple[Any, dict[str, Any]]]:  # fmt: skip
    """The launches of one forward and backward on meta tensors."""
    recorders = [(module, Recorder(getattr(module, name))) for module, names in _KERNELS.items() for name in names]
    fixed = torch.are_deterministic_algorithms_enabled()
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for module, recorder in recorders:
            patch.setattr(module, recorder.kernel.__name__, recorder)
        patch.setattr(attention, "_host_c", lambda *_: c)
        for module in (launch, launch_tile):
            patch.setattr(module, "has_large_tiles", lambda _: arch in (90, 100))
        patch.setattr(tile_rule, "LARGEST_SHARE", 2.0)  # never the library's backward
        torch.use_deterministic_algorithms("fixed" in features)
        try:
            _call(n, heads, groups, d, getattr(torch, dtype), sampler, features, site)
        finally:
            torch.use_deterministic_algorithms(fixed)
    return [(r.kernel, call) for _, r in recorders for call in r.calls]


def _call(
    n: int, heads: int, groups: int, d: int, dtype: torch.dtype, sampler: str, features: tuple[str, ...], site: int
) -> None:  # fmt: skip
    def new(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    tensors: dict[str, Any] = dict.fromkeys(("attn_mask", "attn_bias", "sinks", "query_ids", "key_ids", "prefix"))
    if "padding" in features:
        tensors["attn_mask"] = torch.empty(1, 1, 1, n, dtype=torch.bool)
    if "mask" in features:
        tensors["attn_mask"] = torch.empty(1, 1, n, n, dtype=torch.bool)
    if "bias" in features:
        tensors["attn_bias"] = new(1, heads, n, n)
    if "sinks" in features:
        tensors["sinks"] = new(heads)
    if "ids" in features:
        tensors["query_ids"] = tensors["key_ids"] = torch.empty(1, n, dtype=torch.int32)
    if "prefix" in features:
        tensors["prefix"] = torch.empty(1, dtype=torch.int64)
    static = Static(
        scale=d**-0.5,
        left=1024 if "window" in features else None,
        right=0 if "causal" in features else None,
        softcap=30.0 if "softcap" in features else 0.0,
        dropout_p=0.1 if "dropout" in features else 0.0,
        sampler=sampler,
        site=site,
        forward="library" if "library" in features else "auto",
    )
    problem = Problem(new(1, heads, n, d), new(1, groups, n, d), new(1, groups, n, d), **tensors, static=static)
    c, seed = torch.empty((), dtype=torch.float64), torch.empty((), dtype=torch.int64)
    out, softmax, kept = attention.forward(problem, c, seed, seed)
    attention.backward(problem, Upstream(out, out, softmax, kept, c, seed, seed, "bias" in features))


def main(arch: int, options: dict[str, Any], only: str = "") -> None:
    for kernel, call in record(**options, arch=arch):
        if only in kernel.__name__ and not call.get("OVERFLOW"):
            print(json.dumps(inspect(kernel, call, arch)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}, *sys.argv[3:])
