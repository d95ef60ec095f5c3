"""c="auto", the measured speed-ups and the account, in real fits."""

from __future__ import annotations

import copy
import math
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
from landscapes import World
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import LM, Plain, equal, loader, trainer, weights
from test_callback import Resumable
from test_loggers import of_csv

from sus_lightning import AutoC, SUSBackprop, VarianceTarget
from sus_lightning.account import Account, interval
from sus_lightning.probe import Probe
from sus_lightning.timing import Clock, StepTimes, compile_seconds


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def fitted(callback: SUSBackprop, module: Any = None, steps: int = 10, **options: Any) -> tuple[Any, pl.Trainer]:
    seed_everything(3, verbose=False)
    module = module or Plain()
    fit = trainer(callbacks=[callback], max_steps=steps, **options)
    fit.fit(module, loader(60))
    return module, fit


def test_auto_is_the_default_and_a_number_stays_a_number() -> None:
    assert isinstance(SUSBackprop(compiler="eager").schedule, AutoC)
    assert isinstance(SUSBackprop(c="auto", compiler="eager").schedule, AutoC)
    assert SUSBackprop(c=30, compiler="eager").c == 30
    with pytest.raises(ValueError, match="variance_every_n_steps must be above 0 for c=AutoC"):
        SUSBackprop(variance_every_n_steps=0)
    with pytest.raises(TypeError, match=r"c must be 'auto', a number above 0.*'automatic'"):
        SUSBackprop(c="automatic")  # type: ignore[arg-type]


class Simulated(SUSBackprop):
    """With the times of a known landscape in place of the machine's; all else is the real probe's."""

    world = World(rest=0.6, per_entry=1e-3, at_one=1.0, slope=1.5, noise_scale=1.0, keys=1e9)

    def _observe(self, probe: Probe, *args: Any) -> None:
        def with_times(*arguments: Any) -> dict[str, float]:
            values = probe(*arguments)
            for name in [n for n in values if n.endswith("step_seconds")]:
                at = name.split("/")[1] if name.startswith("at/") else self.c
                values[name] = 1.0 if name.startswith("exact") else self.world.time(float(at))
            # How many training steps were timed before a probe differs after a resume.
            values |= {n: 2.0 for n in values if n.endswith("step_samples")}
            return values | {"probe_seconds": 1.0}

        with_times.expectation = probe.expectation  # type: ignore[attr-defined]
        super()._observe(with_times, *args)  # type: ignore[arg-type]


@pytest.mark.parametrize("per", ["model", "layer"])
def test_auto_is_neutral_chooses_and_resumes_to_the_bit(per: str, tmp_path: Path) -> None:
    def run(resume: Any = None) -> tuple[Any, Simulated]:
        torch._dynamo.reset()
        seed_everything(3, verbose=False)
        module, callback = Plain(), Simulated(AutoC(per=per, start=64), compiler="eager", variance_every_n_steps=2)
        saves = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=6)
        fit = trainer(callbacks=[callback, saves], max_steps=14, enable_checkpointing=True)
        fit.fit(module, Resumable(), **({"ckpt_path": resume, "weights_only": False} if resume else {}))
        return module, callback

    whole, callback = run()
    assert callback.c < 64
    assert len(callback.backend.state.site_c) == (2 if per == "layer" else 0)
    resumed, other = run(str(tmp_path / "step=6.ckpt"))
    assert other.schedule.state_dict() == callback.schedule.state_dict()  # type: ignore[attr-defined]
    assert other.backend.state.site_c == callback.backend.state.site_c
    assert equal(weights(resumed), weights(whole))
    if per == "model":  # the same c at the same steps, without probes
        torch._dynamo.reset()
        seed_everything(3, verbose=False)
        again = Plain()
        steps = dict(callback.summary.c)  # type: ignore[union-attr]
        plain = SUSBackprop(c=steps, compiler="eager", variance_every_n_steps=0)
        trainer(callbacks=[plain], max_steps=14).fit(again, Resumable())
        assert equal(weights(again), weights(whole))


def test_speedups_are_logged_and_the_account_is_complete(tmp_path: Path) -> None:
    callback = SUSBackprop(c=6, compiler="eager", variance_every_n_steps=3, progress_bar=["net_speedup"])
    logger = CSVLogger(tmp_path)
    _, fit = fitted(callback, logger=logger, log_every_n_steps=2)
    logged = of_csv(logger)
    speedups = [value for _, value in logged["sus/step_speedup"]]
    assert [step for step, _ in logged["sus/step_speedup"]] == [1, 4, 7]
    assert all(0.05 < value < 20 for value in speedups)
    variance = [value for _, value in logged["sus/relative_variance"]]
    for step, net, r in zip(speedups, (v for _, v in logged["sus/net_speedup"]), variance, strict=True):
        assert step / (1 + r) <= net * (1 + 1e-6) <= step * (1 + 1e-6)
    assert "sus/net_speedup" in fit.progress_bar_metrics
    assert "sus/step_speedup" not in fit.progress_bar_metrics
    assert not [name for name in logged if ("seconds" in name and "summary" not in name) or "at/" in name]
    summary = callback.summary
    assert summary is not None
    assert (summary.rewritten, summary.left, summary.steps, summary.probes) == (2, 0, 10, 3)
    assert summary.c == ((0, 6.0),)
    assert summary.kept_per_row == pytest.approx(
        sum(v for _, v in logged["sus/kept_per_row"]) / len(logged["sus/kept_per_row"]), rel=0.1
    )
    assert summary.step_speedup == pytest.approx(sorted(speedups)[1], rel=1e-4)
    assert 0 < summary.probe_seconds < summary.seconds
    assert 0 < summary.compile_seconds < summary.seconds
    assert logged["sus/summary_step_speedup"][-1][1] == pytest.approx(summary.step_speedup)
    assert logged["sus/summary_seconds"][-1][1] == pytest.approx(summary.seconds)
    text = str(summary)
    for part in ("2 of 2 with a SUS backward", "kept entries", "speed-up of a step", "worst kind", "in probes"):
        assert part in text
    assert "nan" not in text


def test_the_account_is_shown_once_when_fit_ends(capsys: Any, caplog: Any) -> None:
    callback = SUSBackprop(c=6, compiler="eager", variance_every_n_steps=3)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(callback)
    shown = capsys.readouterr()
    assert (caplog.text + shown.out + shown.err).count("SUS backprop in this fit:") >= 1


def test_an_account_without_probes_says_not_measured() -> None:
    callback = SUSBackprop(c=6, compiler="eager", variance_every_n_steps=0)
    fitted(callback, steps=3)
    text = str(callback.summary)
    assert text.count("not measured") >= 3
    assert "nan" not in text.replace("noise scale nan", "")


def test_a_fit_that_was_interrupted_has_an_account_too() -> None:
    class Stops(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 4:
                raise ArithmeticError("planted")
            return super().training_step(batch, batch_idx)

    callback = SUSBackprop(c=6, compiler="eager", variance_every_n_steps=2)
    with pytest.raises(ArithmeticError):
        fitted(callback, Stops())
    assert callback.summary is not None
    assert callback.summary.steps == 4
    assert callback.summary.probes == 2


def test_what_is_no_fit_has_no_account() -> None:
    class Stops(Plain):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            raise ArithmeticError("planted")

    callback = SUSBackprop(c=6, compiler="eager")
    with pytest.raises(ArithmeticError):
        trainer(callbacks=[callback]).validate(Stops(), loader(), verbose=False)
    assert callback.summary is None


def test_settling_at_infinity_is_said_once_with_the_reason(caplog: Any, capsys: Any) -> None:
    class NoGain(Simulated):
        world = World(rest=1.2, per_entry=1e-3, at_one=1.0, slope=1.5, noise_scale=1.0, keys=1e9)

    callback = NoGain(compiler="eager", variance_every_n_steps=1)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _, fit = fitted(callback, steps=9)
    assert math.isinf(callback.c)
    shown = capsys.readouterr()
    text = caplog.text + shown.out + shown.err
    assert text.count("SUS would not speed this model up at n = 48") == 1, text
    assert "attention's backward is" in text
    assert fit.callback_metrics["sus/step_speedup"] == 1
    assert math.isinf(callback.summary.c[-1][1])  # type: ignore[union-attr]


def test_going_to_infinity_is_neutral() -> None:
    """Attention's share of a step is counted then, in two more forwards."""

    class NoGain(Simulated):
        world = World(rest=1.3, per_entry=1e-3, at_one=1.0, slope=1.5, noise_scale=1.0, keys=1e9)

    def run(callback: SUSBackprop) -> Any:
        torch._dynamo.reset()
        seed_everything(3, verbose=False)
        return weights(fitted(callback, Plain(LM(dropout=0.1)), 6)[0])

    callback = NoGain(compiler="eager", variance_every_n_steps=2)
    trained = run(callback)
    assert callback.summary is not None
    assert math.isinf(callback.summary.c[-1][1])
    without = SUSBackprop(dict(callback.summary.c), compiler="eager", variance_every_n_steps=0)
    assert equal(trained, run(without))


def test_a_fit_with_one_probe_says_at_its_end_that_nothing_is_gained(caplog: Any, capsys: Any) -> None:
    class NoGain(Simulated):
        world = World(rest=1.3, per_entry=1e-3, at_one=1.0, slope=1.5, noise_scale=1.0, keys=1e9)

    callback = NoGain(compiler="eager", variance_every_n_steps=100)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fitted(callback, steps=4)
    shown = capsys.readouterr()
    text = caplog.text + shown.out + shown.err
    assert text.count("SUS would not speed this model up at n = 48") == 1, text


@pytest.mark.parametrize(
    ("speedups", "c", "said"),
    [
        ([1.1, 1.3, 0.85, 1.2], 30.0, "none beyond the noise: 1.15x measured (95% from 0.8"),
        ([1.3], 30.0, "none beyond the noise: 1.30x measured"),
        ([1.4, 1.38, 1.45, 1.41], 30.0, "1.40x (forward and backward; 95% from 1.2"),
        ([0.7, 0.72, 0.69], 30.0, "none: 0.70x, slower than the exact backward"),
        ([1.0, 1.0], math.inf, "none: c = inf is the exact backward"),
        ([], 30.0, "not measured"),
    ],
)
def test_a_speed_up_is_claimed_beyond_its_noise_only(speedups: list[float], c: float, said: str) -> None:
    account = Account()
    for step, speedup in enumerate(speedups):
        account.note_probe(step, c, {"exact_step_seconds": speedup, "step_seconds": 1.0})
    summary = account.summary(1, 0, 10)
    assert f"speed-up of a step   {said}" in str(summary)
    inside = summary.step_speedup_low <= summary.step_speedup <= summary.step_speedup_high
    assert inside or not speedups


def test_the_interval_covers_the_truth() -> None:
    """Of 2000 fits with 4 probes that scatter by 20%: in 95%, and not much more often."""
    rng = random.Random(0)
    found = [interval([1.2 * math.exp(rng.gauss(0, 0.2)) for _ in range(4)]) for _ in range(2000)]
    assert 0.92 < sum(low <= 1.2 <= high for low, high in found) / 2000 < 0.99


def test_what_sus_gains_is_that_of_the_last_c() -> None:
    account = Account()
    for step, (c, speedup) in enumerate([(256.0, 0.8), (64.0, 1.2), (16.0, 1.4), (16.0, 1.5), (16.0, 1.45)]):
        account.note_probe(step, c, {"exact_step_seconds": speedup, "step_seconds": 1.0})
    assert account.summary(1, 0, 10).step_speedup == 1.45


def test_probes_stay_below_3_percent_of_the_time_by_default() -> None:
    """A probe that costs as much as 1000 steps is not repeated for as long as that takes."""
    pacing, fit = SUSBackprop(c=6, compiler="eager")._pacing, trainer()
    seconds = {"probe_seconds": 9.0, "step_seconds": 0.01}
    pacing.probed(fit, 1, seconds, math.nan)
    assert pacing.not_before == pytest.approx(1 + 9 / 0.03 / 0.01, abs=1)
    pacing.probed(fit, 1, seconds, 0.1)
    assert pacing.not_before == pytest.approx(1 + 9 / 0.03 / 0.1, abs=1)
    assert not pacing.is_due(2000, 200)
    assert pacing.is_due(3003, 200)
    by_hand = SUSBackprop(c=6, compiler="eager", variance_every_n_steps=5)._pacing
    by_hand.probed(fit, 1, seconds, 0.1)
    assert by_hand.is_due(6, 5)


def test_the_picture(tmp_path: Path) -> None:
    callback = SUSBackprop(AutoC(start=64), compiler="eager", variance_every_n_steps=2)
    fitted(callback)
    figure = callback.plot()
    titles = [axes.get_title() for axes in figure.axes]
    assert [title.split()[0] for title in titles] == ["Training", "c", "Variance", "Speed-up"]
    assert all(axes.lines for axes in figure.axes)
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert SUSBackprop(c=6, compiler="eager").plot().axes  # before a fit: empty, no error


def test_an_account_survives_pickle_and_checkpoint() -> None:
    callback = SUSBackprop(VarianceTarget(0.05, start=6), compiler="eager", variance_every_n_steps=2)
    fitted(callback)
    state = callback.state_dict()["account"]
    other = Account()
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert other == callback._account
    assert other.summary(2, 0, 10) == callback.summary
    damaged: list[tuple[dict[str, Any], str]] = [
        ({"c": 1}, "c must be a list of pairs"),
        ({"c": [(0, -1.0)]}, "c at step 0 must be above 0"),
        ({"losses": [(1, "x")]}, "losses at step 1 must be a number"),
        ({"losses": [(-1, 2.0)]}, "a step of losses must be at least 0"),
        ({"seconds": None}, "seconds must be a number"),
        ({"rows": -1.0}, "rows must be finite and at least 0"),
        ({"probes": [{"step": 1.0}]}, r"probes\[0\] must have c, relative_variance"),
        ({"probes": [{**state["probes"][0], "c": "6"}]}, r"probes\[0\]\['c'\] must be a number"),
    ]
    before = callback.state_dict()
    for change, message in damaged:
        with pytest.raises((TypeError, ValueError), match=f"the saved state of the account: {message}"):
            other.load_state_dict({**state, **change})
        with pytest.raises((TypeError, ValueError), match=f"the saved state of the account: {message}"):
            callback.load_state_dict({**before, "c": 3.0, "account": {**state, **change}})
    with pytest.raises((TypeError, ValueError), match="the saved state of SUSBackprop: not_before must be at least 0"):
        callback.load_state_dict({**before, "c": 3.0, "not_before": -1})
    assert other == callback._account
    assert callback.state_dict() == before
    auto = SUSBackprop(compiler="eager")
    auto.load_state_dict(callback.state_dict())  # a run may go on with another schedule
    assert auto.schedule.state_dict() == AutoC().state_dict()
    new = ("account", "not_before", "schedule_type")
    old = {k: v for k, v in callback.state_dict().items() if k not in new}  # a checkpoint of before
    resumed = SUSBackprop(VarianceTarget(0.05, start=6), compiler="eager")
    resumed.load_state_dict(old)
    assert resumed.schedule.state_dict() == callback.schedule.state_dict()  # type: ignore[attr-defined]
    auto.load_state_dict(old)  # what has no type is not AutoC's
    assert auto.schedule.state_dict() == AutoC().state_dict()


@pytest.mark.parametrize("how", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copy_during_a_fit_has_the_account_so_far_and_no_clock(how: Any) -> None:
    class Copies(pl.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            made.append(how(callback))
            saved.append(callback.state_dict()["account"])

    made: list[SUSBackprop] = []
    saved: list[dict[str, Any]] = []
    callback = SUSBackprop(AutoC(start=64, per="layer"), compiler="eager", variance_every_n_steps=2)
    seed_everything(3, verbose=False)
    fit = trainer(callbacks=[callback, Copies()], max_steps=6)
    fit.fit(Plain(), loader(60))
    assert callback.summary is not None
    twin = made[-1]
    assert (twin._times, twin._pacing._since, twin._account._running) == (None,) * 3
    assert 0 < twin._account.seconds < callback.summary.seconds
    assert twin._account.probes == callback._account.probes
    assert twin._account is not callback._account
    assert twin.schedule.state_dict() == callback.schedule.state_dict()  # type: ignore[attr-defined]
    assert twin.c == callback.c
    seen = [account["seconds"] for account in saved]
    assert 0 < seen[0] < seen[-1] < callback.summary.seconds  # a checkpoint holds the time so far
    seconds = twin._account.seconds
    twin._account.stop()
    assert twin._account.seconds == seconds
    fitted(twin, steps=4)
    assert twin.summary is not None
    assert twin.summary.probes == 2
    assert twin.backend.report.rewritten == 2


def test_a_long_series_is_thinned_and_keeps_its_ends() -> None:
    account = Account()
    for step in range(5000):
        account.note_c(step, 1.0 + step)
    assert len(account.c) <= 1001
    assert account.c[0] == (0, 1.0)
    assert account.c[-1] == (4999, 5000.0)


def test_step_times_are_those_of_the_same_c_and_shapes() -> None:
    class Ticks:
        at = 0.0

        def now(self) -> float:
            return self.at

        def seconds(self, start: float, end: float) -> float | None:
            return None if end > 100 else end - start

    clock = Ticks()
    times = StepTimes(clock, keep=4)  # type: ignore[arg-type]
    for c, length, seconds in ((30.0, 4, 1.0), (30.5, 4, 2.0), (64.0, 4, 3.0), (30.0, 8, 4.0)):
        times.start(c, {"x": torch.zeros(2, length)})
        clock.at += seconds
        times.stop()
        times.stop()  # LBFGS goes through the backward more than once
        clock.at += 10
    assert times.seconds(30.0, {"x": torch.zeros(2, 4)}) == [2.0]  # the first step of all has compiled things
    assert times.seconds(30.0, {"x": torch.zeros(2, 8)}) == [4.0]
    assert times.seconds(64.0, {"x": torch.ones(2, 4)}) == [3.0]
    times.start(7.0, torch.zeros(1))
    torch.compile(lambda x: x.cos() + 2, backend="eager")(torch.zeros(3))
    times.stop()
    assert times.seconds(7.0, torch.zeros(1)) == []
    times.start(9.0, torch.zeros(1))
    clock.at = 200.0
    times.stop()
    assert times.seconds(9.0, torch.zeros(1)) == []  # the device has not come that far: nobody waits


def test_a_clock_on_a_gpu_asks_for_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device's module without `synchronize`: to wait would be an AttributeError."""

    class Event:
        recorded: ClassVar[list[Event]] = []
        done = False

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            assert stream == "the current one"
            self.recorded.append(self)

        def query(self) -> bool:
            return self.done

        def elapsed_time(self, end: Event) -> float:
            assert end.done
            return 250.0 * (self.recorded.index(end) - self.recorded.index(self))

    module = SimpleNamespace(Event=Event, current_stream=lambda device: "the current one")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    times = StepTimes(Clock(torch.device("cuda:0")))
    for _ in range(3):
        times.start(30.0, torch.zeros(2))
        times.stop()
    assert times.seconds(30.0, torch.zeros(2)) == []  # nothing has run on the device yet
    Event.recorded[2].done = True
    assert times.seconds(30.0, torch.zeros(2)) == [0.25]
    assert len(Event.recorded) == 6 - 1  # the first step of all counts nothing


def test_compile_seconds_count() -> None:
    before = compile_seconds()
    torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.zeros(3))
    assert compile_seconds() > before
