"""A probe leaves no trace: runs with and without probes end in bitwise equal weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.plugins import MixedPrecision
from models import LM, Nasty, Plain, Tokens, equal, loader, loss_of, trainer, weights
from torch.utils.data import DataLoader

import sus_lightning.callback
from fx_passes.state import State
from sus_lightning import SUSBackprop
from sus_lightning.snapshot import Snapshot


class Manual(Plain):
    """Two optimizers, toggled, each stepping every other batch, with clipping and a scheduler."""

    def __init__(self) -> None:
        super().__init__(LM(dropout=0.1))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            with optimizer.toggle_model():
                loss = loss_of(self.model(batch), batch)
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 0.5, "norm")
                if batch_idx % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    scheduler.step()

    def configure_optimizers(self) -> Any:
        layers = torch.optim.Adam(self.model.layers.parameters(), lr=1e-2)
        others = [p for name, p in self.model.named_parameters() if not name.startswith("layers")]
        optimizers = [layers, torch.optim.SGD(others, lr=1e-2, momentum=0.9)]
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]


class Reentrant(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.model.embedding(batch)
        for layer in self.model.layers:
            hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=True)
        return loss_of(self.model.head(hidden), batch)


class Scripted(Plain):
    """A child whose buffers are in C++, running statistics among them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.jit.script(torch.nn.Sequential(torch.nn.BatchNorm1d(32)))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.norm(self.model(batch).flatten(0, 1)).view(*batch.shape, -1), batch)


class DictTokens(Tokens):
    def __getitem__(self, i: int) -> Any:
        return {"tokens": super().__getitem__(i)}


def run(make: type, every: int, dicts: bool = False, compiler: str = "eager", **options: Any) -> Any:
    torch._dynamo.reset()
    seed_everything(3, verbose=False)
    module = make()
    callback = SUSBackprop(c=4, compiler=compiler, variance_every_n_steps=every, variance_draws=2)
    if make is Reentrant:
        callback = SUSBackprop(
            c=4, compiler=compiler, variance_every_n_steps=every, modules=["model.layers.0", "model.layers.1"]
        )
    if options.get("plugins") == "16-mixed":
        # By Trainer(precision="16-mixed") Lightning takes bf16-mixed on a CPU.
        options["plugins"] = MixedPrecision("16-mixed", "cpu")
    data = DataLoader(DictTokens(30), batch_size=4) if dicts else loader(30)
    fit = trainer(callbacks=[callback], max_steps=7, **options)
    fit.fit(module, data)
    return module, callback, fit


CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "plain": (Plain, {}),
    "dropout, batch norm, metrics, logging, attributes": (Nasty, {}),
    "a training step that takes things out of its batch": (Nasty, {"dicts": True}),
    "gradient accumulation and clipping": (Nasty, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    "manual optimization": (Manual, {}),
    "reentrant checkpoints": (Reentrant, {}),
    "scripted child": (Scripted, {}),
    "16-mixed with the scaler": (Nasty, {"plugins": "16-mixed"}),
    "bf16-mixed": (Nasty, {"precision": "bf16-mixed"}),
    "bf16-true": (Plain, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_bitwise_equal_with_and_without_probes(case: str) -> None:
    make, options = CASES[case]
    probed, callback, fit = run(make, 2, **options)
    plain, other, _ = run(make, 0, **options)
    assert fit.callback_metrics["sus/relative_variance"] > 0
    assert "sus/relative_variance" not in _.callback_metrics
    assert equal(weights(probed), weights(plain))
    assert callback.backend.state.counter == other.backend.state.counter
    if make is Nasty:
        assert probed.calls == plain.calls == len(probed.losses)
        assert probed.by_name.keys() == plain.by_name.keys()
        assert torch.equal(probed.by_name["sum"], plain.by_name["sum"])
        for name in ("mean_epoch", "loss_epoch"):  # nothing that a probe computed was logged
            assert torch.equal(fit.callback_metrics[name], _.callback_metrics[name])


def test_weights_are_bitwise_equal_with_inductor() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, Inductor's kernels for the CPU add atomically: no two runs are equal
    try:
        probed, *_ = run(Plain, 2, compiler="inductor")
        plain, *_ = run(Plain, 0, compiler="inductor")
    finally:
        torch.set_num_threads(threads)
    assert equal(weights(probed), weights(plain))


def test_grads_keep_their_identity_and_an_exception_in_a_probe_restores() -> None:
    class Fails(Nasty):
        fail = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            if self.fail:
                raise ArithmeticError("planted")
            return output

    seed_everything(0, verbose=False)
    module = Fails()
    callback = SUSBackprop(c=4, compiler="eager", variance_every_n_steps=3)
    seen = {}

    class Watch(SUSBackprop):
        pass

    fit = trainer(callbacks=[callback], max_steps=4)

    def before(*_: Any) -> None:
        if fit.global_step == 1:
            module.fail = True
            seen.update(grads=[p.grad for p in module.parameters()], weights=weights(module), calls=module.calls)
            seen.update(rng=torch.get_rng_state(), counter=callback.backend.state.counter, log=vars(module).get("log"))

    original = callback.on_train_batch_start
    callback.on_train_batch_start = lambda *a: (before(), original(*a))  # type: ignore[method-assign]
    with pytest.raises(ArithmeticError, match="planted"):
        fit.fit(module, loader())
    assert [p.grad for p in module.parameters()] == seen["grads"] or all(
        a is b for a, b in zip((p.grad for p in module.parameters()), seen["grads"], strict=True)
    )
    assert equal(weights(module), seen["weights"])
    assert module.calls == seen["calls"]
    assert torch.equal(torch.get_rng_state(), seen["rng"])
    assert callback.backend.state.counter == seen["counter"]
    assert vars(module).get("log") is seen["log"]
    assert callback.backend.c == 4
    assert module.model._compiled_call_impl is None


def test_a_probe_measures_what_a_direct_computation_measures() -> None:
    """The values of one probe against gradients that are computed here, by hand."""
    seed_everything(1, verbose=False)
    module = Plain()
    callback = SUSBackprop(c=4, compiler="eager", variance_every_n_steps=1, variance_draws=300)
    batches = list(loader())
    expected = {}

    class Direct(torch.utils.data.Dataset):  # type: ignore[type-arg]
        pass

    original = callback.on_train_batch_start

    def direct(fit: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        original(fit, pl_module, batch, batch_idx)
        if fit.global_step != 1:
            return
        callback._disable()  # the untouched module
        gradients = []
        for tokens in batches[:2]:
            loss = loss_of(module.model(tokens), tokens)
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        callback._enable()
        g1, g2 = (torch.cat([g.flatten() for g in gs]).double() for gs in gradients)
        expected["batch_variance"] = float((g1 - g2).square().sum() / 2)
        expected["gradient_noise_scale"] = expected["batch_variance"] / float(g1 @ g2)
        state = callback.backend.state.counter
        noise = []
        for _ in range(300):
            loss = loss_of(module.model(batches[1]), batches[1])
            g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]).double()
            noise.append(float((g - g2).square().sum()))
        callback.backend.state.counter = state
        expected["sus_variance"] = sum(noise) / len(noise)
        expected["error"] = float(torch.tensor(noise).std()) / len(noise) ** 0.5

    callback.on_train_batch_start = direct  # type: ignore[method-assign]
    fit = trainer(callbacks=[callback], max_steps=2)
    fit.fit(module, loader())
    values = callback._variance
    assert values["batch_variance"] == pytest.approx(expected["batch_variance"], rel=1e-4)
    # The scale is NaN where the product of the two gradients is negative.
    if expected["gradient_noise_scale"] > 0:
        assert values["gradient_noise_scale"] == pytest.approx(expected["gradient_noise_scale"], rel=1e-3)
    assert abs(values["sus_variance"] - expected["sus_variance"]) < 5 * 2**0.5 * expected["error"]
    assert values["relative_variance"] == pytest.approx(values["sus_variance"] / values["batch_variance"])


def test_the_scale_of_float16_gradients_is_not_in_the_variance() -> None:
    values = [run(Plain, 2, **options)[1]._variance for options in ({}, {"plugins": "16-mixed"})]
    for name in ("batch_variance", "sus_variance"):
        assert values[1][name] == pytest.approx(values[0][name], rel=0.3)  # a scale of 65536 would be squared


def test_micro_batches_of_a_step_give_the_batch_variance() -> None:
    """Of three micro-batches the two pairs of neighbours, against gradients that are computed here."""
    seed_everything(1, verbose=False)
    module, batches = Plain(), list(loader())
    callback = SUSBackprop(c=4, compiler="eager", variance_every_n_steps=1)
    original, checked = callback.on_train_batch_start, []

    def direct(fit: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        probed_before = callback._pacing.probed_step
        original(fit, pl_module, batch, batch_idx)
        if callback._pacing.probed_step == probed_before:
            return
        assert batch_idx % 3 == 2  # the last micro-batch of the step
        callback._disable()
        gradients = []
        for tokens in batches[batch_idx - 2 : batch_idx + 1]:
            loss = loss_of(module.model(tokens), tokens)
            found = torch.autograd.grad(loss, list(module.parameters()))
            gradients.append(torch.cat([g.flatten() for g in found]).double())
        callback._enable()
        a, b, c = gradients
        spread = ((a - b).square().sum() + (b - c).square().sum()) / 4 / 3  # two pairs, halved; three batches per step
        product = (a @ b + b @ c) / 2
        assert callback._variance["batch_variance"] == pytest.approx(float(spread), rel=1e-4)
        if product > 0:
            assert callback._variance["gradient_noise_scale"] == pytest.approx(float(spread / product), rel=1e-3)
        checked.append(fit.global_step)

    callback.on_train_batch_start = direct  # type: ignore[method-assign]
    trainer(callbacks=[callback], max_steps=4, accumulate_grad_batches=3).fit(module, loader())
    assert checked == [1, 2, 3]


def test_probe_compiles_nothing() -> None:
    torch._dynamo.reset()
    seed_everything(0, verbose=False)
    frames = []

    class Count(SUSBackprop):
        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            frames.append(sum(torch._dynamo.utils.counters["frames"].values()))

    torch._dynamo.utils.counters.clear()
    trainer(callbacks=[Count(c=4, compiler="aot_eager", variance_every_n_steps=1)]).fit(Plain(), loader())
    assert frames[0] > 0
    assert len(set(frames)) == 1


def test_probe_at_the_default_interval_is_at_step_1_and_then_every_n(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []

    def publish(fit: Any, module: Any, values: Any, shown: Any = ()) -> None:
        if "relative_variance" in values:
            steps.append(fit.global_step)

    monkeypatch.setattr(sus_lightning.callback, "publish", publish)
    sus = SUSBackprop(c=4, compiler="eager", variance_every_n_steps=5)
    trainer(callbacks=[sus], max_steps=14).fit(Plain(), loader(20))
    # 20 / 4 = 5 batches per epoch: step 1 is the second batch; step 6 is the second of the next epoch.
    assert steps == [1, 6, 11]


def test_snapshot_restores_tensors_in_place() -> None:
    module = Nasty()
    state = State(3.0)
    state.set_site_c({1: 5.0})
    snapshot = Snapshot(module, state)
    average, total, losses = module.average, module.by_name["sum"], module.losses
    with torch.no_grad():
        average.add_(1)
        total.add_(1)
    losses.append(total)
    module.average = torch.ones(())
    module.added = 1  # type: ignore[assignment]
    module.mean.update(3.0)
    module.model.layers[0].batch_norm.eval()
    state.counter, state.c = 7, 9.0
    snapshot.restore()
    assert module.average is average
    assert average == 0
    assert module.by_name["sum"] is total
    assert total == 0
    assert module.losses is losses
    assert losses == []
    assert not hasattr(module, "added")
    assert module.mean.update_count == 0
    assert module.model.layers[0].batch_norm.training
    assert (state.counter, state.c, state.site_c) == (0, 3.0, {1: 5.0})


def test_probes_never_use_the_draws_of_training_steps() -> None:
    """Else a c that is adapted from a probe would depend on the noise of the step it is used for."""
    callback = SUSBackprop(c=4, compiler="eager", variance_every_n_steps=1, variance_draws=3)
    seeds: dict[bool, list[int]] = {False: [], True: []}
    in_probe = False
    next_seed, start = callback.backend.state.next_seed, callback.on_train_batch_start

    def record() -> int:
        seed = next_seed()
        if callback.backend.c == 4:  # an exact gradient reads a seed and does not use it
            seeds[in_probe].append(seed)
        return seed

    def on_train_batch_start(*args: Any) -> None:
        nonlocal in_probe
        in_probe = True
        start(*args)
        in_probe = False

    callback.backend.state.next_seed = record  # type: ignore[method-assign]
    callback.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    trainer(callbacks=[callback], max_steps=5).fit(Plain(), loader())
    assert len(seeds[False]) == 5
    assert len(set(seeds[True])) == len(seeds[True]) == 3 * 4
    assert not set(seeds[True]) & set(seeds[False])
