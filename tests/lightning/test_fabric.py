"""Fabric needs no callback: a model that is compiled with SUSBackend, before or after `Fabric.setup`."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric import Fabric
from models import LM, loader, loss_of

from fx_passes import SUSBackend


@pytest.mark.parametrize("order", ["compile first", "set up first"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(order: str, precision: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)  # type: ignore[arg-type]
    backend, model = SUSBackend(c=4, compiler="eager"), LM()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    if order == "compile first":
        ready, optimizer = fabric.setup(torch.compile(model, backend=backend), optimizer)
    else:
        ready, optimizer = fabric.setup(model, optimizer)
        ready = torch.compile(ready, backend=backend)
    losses = []
    for epoch in range(2):
        for tokens in loader():
            loss = loss_of(ready(tokens), tokens)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        if epoch == 0:
            kept = backend.state.pop_kept()
            assert backend.report.rewritten == 2
            assert 0 < kept.entries / kept.rows <= 4
            backend.c = 2
    kept = backend.state.pop_kept()
    assert 0 < kept.entries / kept.rows <= 2
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
