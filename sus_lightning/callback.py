"""SUSBackprop: trains a LightningModule with a SUS backward."""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks.callback import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from fx_passes import SUSBackend
from fx_passes.report import REWRITTEN
from sus_lightning.account import Account, Summary, plot
from sus_lightning.auto_c import AT, AutoC
from sus_lightning.compilation import Compilation, plan
from sus_lightning.probe import Probe, copied
from sus_lightning.schedules import ConstantSchedule, Schedule, as_schedule, check_count, schedule_name, value_at
from sus_lightning.strategies import check_strategy
from sus_lightning.timing import Clock, StepTimes
from sus_lightning.variance_target import ALONE, VarianceTarget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INTERVAL = 200  # optimizer steps between two probes, at least, where the user did not say
_BUDGET = 0.03  # of training time in probes
# Values of a probe that are not logged by themselves.
_INTERNAL = {
    "squared_gradient",
    "step_seconds",
    "step_samples",
    "exact_step_seconds",
    "exact_step_samples",
    "probe_seconds",
    "kept_per_row",  # logged from the training steps
    "kept_fraction",
}


class SUSBackprop(Callback):
    """Gives softmax attention the sparse, unbiased backward of SUS backprop (arXiv 2505.15080) while a model trains.

    When ``fit`` starts, the submodules of the LightningModule are compiled in place by a
    :class:`~fx_passes.SUSBackend`, which finds attention in their graphs and exchanges its backward; the forward stays
    as it is. Validation, test and prediction run the module as it was given, and so does everything after ``fit``.
    A module that was already compiled (``torch.compile(lightning_module)``, ``self.model = torch.compile(...)``,
    ``self.model.compile()``) is compiled with the same mode, and given back as it was.

    Every ``variance_every_n_steps`` optimizer steps a probe measures how much variance SUS adds to the gradient,
    relative to the variance that it has from the choice of the batch. It never changes training: weights are bitwise
    equal with and without probes.

    Logged for all loggers, and for callbacks such as ``ModelCheckpoint(monitor=...)``:

    - ``sus/c``, ``sus/attention_rewritten`` (attention sites in the compiled graphs), and ``sus/c_of/<module>`` where
      ``VarianceTarget(per="layer")`` gives each attention its own;
    - ``sus/kept_per_row``, ``sus/kept_fraction``: entries kept per query row, and of all that a dense backward uses,
      over the steps since they were last logged, over all ranks;
    - ``sus/relative_variance`` (0.01 is an increase by 1%), also per kind of parameter (``sus/relative_variance_of/q``,
      ``k``, ``v``, ``o``, ``qkv``, ``rest``) and per layer, ``sus/worst_relative_variance`` (largest of the attention
      projections), ``sus/sus_variance``, ``sus/batch_variance``, ``sus/gradient_noise_scale``: see
      :class:`~sus_lightning.GradientVariance`;
    - ``sus/step_speedup``: seconds of a step's forward and backward, exact over SUS, as the probe measured them, and
      ``sus/net_speedup``: the same divided by the penalty 1 + r x / (1 + x) in steps that the variance costs;
    - ``sus/summary_...``, when fit ends: the numbers of :attr:`summary`, which is also printed.

    Note:
        c and the number of draws so far are saved in checkpoints: a run that was resumed draws what the run without
        interruption would have drawn. With a schedule that has state (:class:`~sus_lightning.VarianceTarget`) so is
        the schedule.

    Note:
        If no attention was rewritten after the first training step, ``fit`` stops with an error that shows what was
        found and why it was left.

    Example::

        from lightning.pytorch import Trainer
        from sus_lightning import LinearSchedule, SUSBackprop, VarianceTarget

        trainer = Trainer(callbacks=[SUSBackprop()])  # c chooses itself
        trainer = Trainer(callbacks=[SUSBackprop(c=30)])
        trainer = Trainer(callbacks=[SUSBackprop(c=LinearSchedule(256, 30, steps=2000))])
        trainer = Trainer(callbacks=[SUSBackprop(c=VarianceTarget(0.01))])
        trainer = Trainer(callbacks=[SUSBackprop(c=lambda step: 256 / (1 + step / 100))])

    Args:
        c: expected number of kept entries per query row and head, above 0; ``float("inf")`` is the exact backward.
            "auto" is :class:`~sus_lightning.AutoC`, which chooses it for the most progress per second. A schedule, a
            dict ``{step: c}`` or any callable of the global step sets it before each training step, without
            recompilation.
        sampler: "systematic" (one draw per row), "independent" (one per entry, as in the paper) or "block" (64 rows
            share their keys, and c counts keys per block; not the paper's).
        compiler: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        variance_every_n_steps: optimizer steps between two probes; 0 turns them off; ``None`` is 200, or as many more
            as keep probes below 3% of the training time. The first probe is at step 1.
        variance_draws: SUS gradients per probe, at least 1. A probe costs ``2 + variance_draws`` forward and backward
            passes, two of them with the exact backward; with ``accumulate_grad_batches`` above 2 it costs that many
            instead of 2. With ``c="auto"`` it is one SUS pass more, at another c.
        seed: fixes the draws; ``None`` follows ``seed_everything``.
        mode: of ``torch.compile``, for modules that the user did not compile; ``compiler="inductor"`` only.
        modules: names of the submodules to compile; ``None`` is all children.
        progress_bar: which of "step_speedup" and "net_speedup" the progress bar shows.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        MisconfigurationException: no attention was rewritten, or the strategy is DeepSpeed.

    """

    def __init__(
        self,
        c: float | Literal["auto"] | Schedule | dict[int, float] | Callable[[int], float] = "auto",
        sampler: str = "systematic",
        compiler: str = "inductor",
        variance_every_n_steps: int | None = None,
        variance_draws: int = 1,
        seed: int | None = None,
        mode: str | None = None,
        modules: list[str] | None = None,
        progress_bar: list[str] | None = None,
    ) -> None:
        self.schedule = AutoC() if isinstance(c, str) and c == "auto" else as_schedule(c)
        self._budgeted = variance_every_n_steps is None
        self.variance_every_n_steps = check_count(
            "variance_every_n_steps", _INTERVAL if variance_every_n_steps is None else variance_every_n_steps
        )
        self.variance_draws = check_count("variance_draws", variance_draws, at_least=1)
        self._mode, self._modules = _check_mode(mode, compiler), _check_modules(modules)
        self._shown = _check_progress_bar(progress_bar)
        start = self.schedule.c if isinstance(self.schedule, ConstantSchedule) else math.inf
        self.backend = SUSBackend(c=start, sampler=sampler, compiler=compiler, seed=seed)
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._compilation: Compilation | None = None
        self._probe: Probe | None = None
        self._earlier: deque[tuple[Any, int]] = deque()
        self._probed_step = self._not_before = 0
        self._variance: dict[str, float] = {}
        self._account = Account()
        self._summary: Summary | None = None
        self._times: StepTimes | None = None
        self._paced: tuple[int, float] | None = None  # step and time since when the loop ran without a probe
        self._told = False
        self._site_c: dict[int, float] = {}  # by number of the site: known before the sites are, after a resume
        self._checked = self._warned = False
        if _observes(self.schedule) and not self.variance_every_n_steps:
            raise ValueError(
                f"variance_every_n_steps must be above 0 for c={schedule_name(self.schedule)}, which adapts c from the "
                f"probes, but it is 0; give c a number to train without probes"
            )

    @property
    def c(self) -> float:
        """The c in use."""
        return self.backend.c

    @property
    def summary(self) -> Summary | None:
        """The account of the last fit; None before one has ended."""
        return self._summary

    def plot(self) -> Figure:
        """A picture of this fit: loss, c, variance and speed-up against the step. ``figure.savefig(path)`` keeps it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot(self._account)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer)
        self._forget()
        self._probed_step, self._not_before, self._variance = 0, 0, {}
        self._account, self._summary, self._told = Account(), None, False
        known = self._module() if self._module is not None else None
        if known is not None and known is not pl_module:
            # The report of another module would hide that nothing is found in this one.
            old = self.backend
            self.backend = SUSBackend(old.c, old.sampler, old.compiler, old.state.seed)
            self.backend.state.counter = old.state.counter
            self._site_c = {}
            if isinstance(self.schedule, AutoC):
                self.schedule.reset()
        self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: `configure_model` and the strategy, which may create and wrap modules, run after it.
        options = {} if self._mode is None else {"mode": self._mode}
        self._compilation = plan(pl_module, self.backend, self._modules, options)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enable()
        self._account.start()
        if not self.variance_every_n_steps:
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            rank_zero_warn(
                "SUSBackprop measures no variance: training_step takes a dataloader_iter instead of a batch."
                + (f" c stays at {self.schedule(0):g}." if _observes(self.schedule) else "")
            )
            return
        # Under manual optimization training_step holds the optimizers' steps, and with several ranks the backward
        # their communication: the probe's own passes do not.
        if pl_module.automatic_optimization and trainer.world_size == 1:
            self._times = StepTimes(Clock(pl_module.device))
        self._probe = Probe(trainer, pl_module, self.backend, self.variance_draws)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disable()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._enable()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The last batch of an epoch may be a small one. Decided by what is the same on all ranks.
        if trainer.num_training_batches > 2:
            self._earlier.clear()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._set_c(step)
        if self._probe is not None:
            if self._earlier and self._is_due(step) and self._may_probe(trainer):
                self._observe(self._probe, batch, batch_idx, step, trainer)
                shares = {f"c_of/{name}": self.backend.state.c_of(sites[0]) for name, sites in self._shared().items()}
                self._publish(trainer, pl_module, {**self._variance, **shares}, ("relative_variance", *self._shown))
            self._keep(trainer, batch, batch_idx)
        self._account.note_c(step, self.backend.c)
        if not trainer.barebones:
            pl_module.log("sus/c", self.backend.c, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        if self._times is not None:
            self._times.start(self.backend.c, batch)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._times is not None:
            self._times.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._checked and (outputs is not None or not pl_module.automatic_optimization):
            self._checked = True
            self._check_rewritten(pl_module)
        if trainer._logger_connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            self._log_now(trainer, {"c": self.backend.c})
            values = self._kept(trainer)
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            if isinstance(loss, torch.Tensor) and loss.numel() == 1:
                self._account.note_loss(trainer.global_step, float(loss))
            if not values and not self._warned:
                self._warned = True
                rank_zero_warn(
                    "SUSBackprop: no attention has run with SUS since c was last logged. If the training step calls "
                    "the module, Dynamo has reached its recompile limit; TORCH_LOGS=recompiles says why it recompiles."
                )
            values["attention_rewritten"] = float(self.backend.report.rewritten)
            self._publish(trainer, pl_module, values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disable()
        self._kept(trainer)
        summary = self._close(trainer)
        rank_zero_info(str(summary))
        numbers = {f"summary_{name}": v for name, v in summary.numbers().items() if math.isfinite(v)}
        self._log_now(trainer, numbers)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._disable()
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._disable()
        self._close(trainer)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "c": self.backend.c,
            "site_c": dict(self._site_c),
            "counter": self.backend.state.counter,
            "probed_step": self._probed_step,
            "not_before": self._not_before,
            "account": self._account.state_dict(),
            "variance": dict(self._variance),
        }
        if isinstance(self.schedule, Schedule):
            state["schedule"] = self.schedule.state_dict()
            state["schedule_type"] = type(self.schedule).__name__
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.backend.c = state_dict["c"]
        self._site_c = dict(state_dict["site_c"]) if self._per_layer else {}
        self.backend.state.counter = state_dict["counter"]
        self._probed_step = state_dict["probed_step"]
        self._not_before = state_dict.get("not_before", 0)
        if state_dict.get("account"):
            self._account.load_state_dict(state_dict["account"])
        self._variance = dict(state_dict["variance"])
        kind = type(self.schedule).__name__  # a run may go on with another schedule: that starts anew
        if (
            isinstance(self.schedule, Schedule)
            and state_dict.get("schedule_type", kind) == kind
            and state_dict.get("schedule")
        ):
            self.schedule.load_state_dict(state_dict["schedule"])

    def _enable(self) -> None:
        if self._compilation is not None:
            self._compilation.enable()

    def _disable(self) -> None:
        if self._compilation is not None:
            self._compilation.disable()

    def _forget(self) -> None:
        self._compilation = self._probe = self._times = self._paced = None
        self._earlier.clear()
        self._checked = self._warned = False

    @property
    def _per_layer(self) -> bool:
        return isinstance(self.schedule, (AutoC, VarianceTarget)) and self.schedule.per == "layer"

    def _set_c(self, step: int) -> None:
        state, c = self.backend.state, value_at(self.schedule, step)
        if (state.c, state.site_c) != (c, self._site_c):  # on a GPU, setting it copies to the device
            state.c = c
            state.set_site_c(self._site_c)

    def _shared(self) -> dict[str, list[int]]:
        """Numbers of the sites of each attention module, where the schedule gives each its own c."""
        sites: dict[str, list[int]] = {}
        if self._per_layer:
            for site in self.backend.report.sites:
                if site.status == REWRITTEN:
                    sites.setdefault(site.module or f"site {site.number}", []).append(site.number)
        return sites

    def _observe(self, probe: Probe, batch: Any, batch_idx: int, step: int, trainer: pl.Trainer) -> None:
        """Probes, and lets the schedule adapt c."""
        shared, schedule, c = self._shared(), self.schedule, self.backend.c
        pace = self._pace(step)
        alone = schedule.measure(list(shared)) if isinstance(schedule, (AutoC, VarianceTarget)) else []
        at: dict[float, dict[int, float]] = {}
        if isinstance(schedule, AutoC):
            for other in schedule.measure_at():
                at[other] = {n: schedule.c_of(name, other) for name, numbers in shared.items() for n in numbers}
        training = self._times.seconds(c, batch) if self._times is not None else []
        values = probe(batch, batch_idx, self._earlier, {name: shared[name] for name in alone}, at, training)
        speedups = self._account.note_probe(step, c, values, getattr(schedule, "on", "total"))
        if isinstance(schedule, Schedule):
            schedule.observe({**values, **speedups})
        if isinstance(schedule, (AutoC, VarianceTarget)):
            self._site_c = {n: schedule.c_of(name) for name, numbers in shared.items() for n in numbers}
        logged = {k: v for k, v in values.items() if k not in _INTERNAL and not k.startswith((ALONE, AT))}
        self._variance = logged | speedups
        self._probed_step = step
        self._set_c(step)
        self._say_if_nothing_is_gained(probe, batch, batch_idx)
        self._space(trainer, step, values, pace)

    def _pace(self, step: int) -> float:
        """Seconds of an optimizer step since the last probe, of everything; NaN where none was."""
        if self._paced is None or step <= self._paced[0]:
            return math.nan
        return (time.perf_counter() - self._paced[1]) / (step - self._paced[0])

    def _space(self, trainer: pl.Trainer, step: int, values: dict[str, float], pace: float) -> None:
        """Keeps the next probe so far away that probes stay within their share of training time."""
        if self._budgeted:
            # Before the first probe steps were compiled: a forward and backward is the least that one takes.
            least = values["step_seconds"] * trainer.accumulate_grad_batches
            slowest = torch.tensor(-(least if math.isnan(pace) else pace), device=trainer.strategy.root_device)
            seconds = -float(trainer.strategy.reduce(slowest, reduce_op="max"))  # the same on all ranks
            wait = values["probe_seconds"] / (_BUDGET * seconds) if seconds > 0 else 0.0
            self._not_before = step + math.ceil(wait)
        self._paced = step, time.perf_counter()

    def _say_if_nothing_is_gained(self, probe: Probe, batch: Any, batch_idx: int) -> None:
        if self._told or not isinstance(self.schedule, AutoC) or not self.schedule.gains_nothing:
            return
        self._told = True
        self._disable()
        try:
            expected = probe.expectation(batch, batch_idx)
        finally:
            self._enable()
        share = (expected.keys, expected.backward_share) if expected is not None and expected.calls else ()
        rank_zero_info(self.schedule.verdict(*share))

    def _kept(self, trainer: pl.Trainer) -> dict[str, float]:
        """Kept entries since the last call, over all ranks."""
        kept = self.backend.state.pop_kept()
        counts = torch.tensor([kept.entries, kept.rows, kept.dense], device=trainer.strategy.root_device)
        entries, rows, dense = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        self._account.note_kept(entries, rows, dense)
        return {"kept_per_row": entries / rows, "kept_fraction": entries / dense} if rows else {}

    def _close(self, trainer: pl.Trainer) -> Summary:
        """Ends the account."""
        self._account.stop()
        if self._summary is None:
            report = self.backend.report
            self._summary = self._account.summary(report.rewritten, report.left, trainer.global_step)
        return self._summary

    def _is_due(self, step: int) -> bool:
        """Whether a probe belongs to this step, or to an earlier one at which it was not possible."""
        every = self.variance_every_n_steps
        return step >= max(1, self._not_before) and (step - 1) // every > (self._probed_step - 1) // every

    def _may_probe(self, trainer: pl.Trainer) -> bool:
        """Whether this batch completes an optimizer step and has the size of the others."""
        odd = trainer.is_last_batch and trainer.num_training_batches > 2
        return not odd and not trainer.fit_loop._should_accumulate()

    def _keep(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        """Keeps what the next probe compares with: the other micro-batches of its step, or else the batch before it."""
        step, count = trainer.global_step, max(1, trainer.accumulate_grad_batches - 1)
        if not self._is_due(step) and not self._is_due(step + 1):
            self._earlier.clear()
            return
        while len(self._earlier) >= count:
            self._earlier.popleft()
        self._earlier.append((copied(batch), batch_idx))

    def _check_rewritten(self, pl_module: pl.LightningModule) -> None:
        report, modules = self.backend.report, self._compilation.modules if self._compilation else []
        if report.rewritten:
            rank_zero_info(f"SUSBackprop: {report}")
            return
        raise MisconfigurationException(
            f"SUSBackprop rewrote no attention of {type(pl_module).__name__}: it would train without SUS. Compiled "
            f"were the submodules {modules}; attention that is computed in the LightningModule's own methods, or in a "
            f"method other than forward of a submodule, is not seen: move it into a submodule, or name that in "
            f"`modules`. "
            f"After many fits in one process, torch._dynamo.reset() makes room for new compilations.\n"
            f"{report}"
        )

    def _publish(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, values: dict[str, float], shown: tuple[str, ...] = ()
    ) -> None:
        """To the loggers at this very step, and to `trainer.callback_metrics` and the progress bar."""
        self._log_now(trainer, values)
        if trainer.barebones:
            return
        for name, value in values.items():
            pl_module.log(f"sus/{name}", value, prog_bar=name in shown, logger=False, on_step=True, on_epoch=False)

    def _log_now(self, trainer: pl.Trainer, values: dict[str, float]) -> None:
        # Not by `self.log`, which writes at the next step of `log_every_n_steps`: a probe is seldom at one.
        for logger in trainer.loggers:
            named = {f"sus/{name}": value for name, value in values.items()}
            logger.log_metrics(named, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _observes(schedule: Callable[[int], float]) -> bool:
    return isinstance(schedule, Schedule) and type(schedule).observe is not Schedule.observe


def _check_mode(mode: Any, compiler: str) -> str | None:
    if mode is None:
        return None
    allowed = list(torch._inductor.list_mode_options())
    if mode not in allowed:
        raise ValueError(f"mode must be None or one of {', '.join(map(repr, allowed))}, but it is {mode!r}")
    if compiler != "inductor":
        raise ValueError(f"mode is for compiler='inductor' only, but mode is {mode!r} and compiler is {compiler!r}")
    return str(mode)


def _check_modules(modules: Any) -> list[str] | None:
    if modules is None:
        return None
    if isinstance(modules, str) or not isinstance(modules, Sequence) or not all(isinstance(m, str) for m in modules):
        raise TypeError(f"modules must be a list of names of submodules or None, but it is {modules!r}")
    if not modules:
        raise ValueError("modules must name at least one submodule, but it is empty")
    return list(modules)


def _check_progress_bar(names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"progress_bar must be a list of names or None, but it is {names!r}")
    for name in names:
        if name not in ("step_speedup", "net_speedup"):
            raise ValueError(f"progress_bar may name 'step_speedup' and 'net_speedup', but it has {name!r}")
    return tuple(names)
