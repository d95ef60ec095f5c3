"""The structs of src/api.h and those of bind.py: fields of the same names in the same places."""

from __future__ import annotations

import subprocess
from ctypes import Structure, sizeof
from pathlib import Path

import pytest

from fx_passes.ops.cpu import bind, build

STRUCTS: dict[str, type[Structure]] = {
    "SusStrides": bind._Strides,
    "SusPlaces": bind._Places,
    "SusCall": bind._Call,
    "SusForward": bind._Forward,
    "SusBackward": bind._Backward,
}


def layout(struct: type[Structure]) -> list[tuple[str, int, int]]:
    fields = [(field[0], getattr(struct, field[0])) for field in struct._fields_]
    return [("", 0, sizeof(struct)), *((name, at.offset, at.size) for name, at in fields)]


@pytest.mark.skipif(bind.library() is None, reason="no C++ compiler")
def test_layouts(tmp_path: Path) -> None:
    """As the compiler has them. A name that the header lacks does not compile; a field that Python lacks shows in the
    size, or moves those behind it."""
    lines = [
        f'printf("{name} {field} %zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));'
        if field
        else f'printf("{name}  0 %zu\\n", sizeof({name}));'
        for name, struct in STRUCTS.items()
        for field, _, _ in layout(struct)
    ]
    source, program = tmp_path / "layout.cpp", tmp_path / "layout"
    source.write_text(f'#include <cstdio>\n#include "{build.SOURCES}/api.h"\nint main() {{ {" ".join(lines)} }}\n')
    subprocess.run([*build.find_compiler(), "-std=c++17", "-w", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = [f"{name} {field} {at} {size}" for name, struct in STRUCTS.items() for field, at, size in layout(struct)]
    assert found == expected


def test_each_field_is_given_by_name() -> None:
    assert bind._filled(bind._Strides, batch=1, head=2, row=3).head == 2
    with pytest.raises(TypeError, match=r"_Strides has other fields: \['row'\]"):
        bind._filled(bind._Strides, batch=1, head=2)
    with pytest.raises(TypeError, match=r"_Strides has other fields: \['key'\]"):
        bind._filled(bind._Strides, batch=1, head=2, row=3, key=4)
