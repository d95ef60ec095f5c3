"""What differs between releases of torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

from fx_passes import SUSBackend
from fx_passes.torch_compat import backend_of_entry, innermost_backend
from sus_lightning import caches


def double(x: torch.Tensor) -> torch.Tensor:
    return x + x


def test_entries_of_old_releases_stay_and_others_go(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    backend = SUSBackend(c=4, compiler="eager")
    torch.compile(double, backend=backend)(torch.ones(2, requires_grad=True))
    [entry] = _debug_get_cache_entry_list(double.__code__)
    with monkeypatch.context() as old:
        old.setattr(caches, "backend_of_entry", lambda _: backend_of_entry(SimpleNamespace()))  # no attribute
        caches.clear_caches(backend)
    assert len(_debug_get_cache_entry_list(double.__code__)) == 1
    if not hasattr(entry, "backend"):
        pytest.skip("an old release")
    assert getattr(backend_of_entry(entry), "compiler_fn", None) is backend
    caches.clear_caches(backend)
    assert not _debug_get_cache_entry_list(double.__code__)
    assert innermost_backend(backend) is backend
