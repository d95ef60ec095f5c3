"""SUSBackprop: trains a LightningModule with a SUS backward."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fx_passes import SUSBackend
from fx_passes.backend import Compiler
from fx_passes.ops.arguments import check_choice
from fx_passes.ops.problem import Forward, Sampler
from sus_lightning._lightning_compat import AnyCallback, accumulates, logs_now
from sus_lightning.account import Account, Summary, plot
from sus_lightning.arguments import check_interval, check_mode, check_modules, check_progress_bar
from sus_lightning.auto_c import AutoC
from sus_lightning.checkpoint import load_saved_state, saved_state
from sus_lightning.compilation import Compilation, plan
from sus_lightning.detached import detached_state
from sus_lightning.earlier_batches import EarlierBatches, may_probe
from sus_lightning.logs import log_now, pop_kept, publish, show
from sus_lightning.metrics import PER
from sus_lightning.pacing import INTERVAL, Pacing
from sus_lightning.probe import Probe, takes_batches, to_be_logged
from sus_lightning.rewritten import FirstStep, warn_of_no_attention
from sus_lightning.schedules import (
    ConstantSchedule,
    Schedule,
    as_schedule,
    check_count,
    observes,
    value_at,
)
from sus_lightning.steering import attention_modules, measured_alone, measured_at, per_layer, site_c
from sus_lightning.strategies import check_strategy
from sus_lightning.timing import Clock, StepTimes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SUSBackprop(AnyCallback):
    """Gives softmax attention the sparse, unbiased backward of SUS backprop (arXiv 2505.15080) while a model trains.

    When ``fit`` starts, the submodules of the LightningModule are compiled in place by a `fx_passes.SUSBackend`, which
    finds attention in their graphs and replaces its backward; the forward stays as it is. Validation, test and
    prediction run the module as it was given, and so does everything after ``fit``. A module that was already compiled
    (``torch.compile(lightning_module)``, ``self.model = torch.compile(...)``, ``self.model.compile()``) is compiled
    with the same mode, and given back as it was.

    Every ``variance_every_n_steps`` optimizer steps a probe measures how much variance SUS adds to the gradient,
    relative to the variance that it has from the choice of the batch. It never changes training: weights are bitwise
    equal with and without probes.

    Logged for all loggers, and for callbacks such as ``ModelCheckpoint(monitor=...)``:

    - ``sus/c``, ``sus/attention_rewritten`` (attention sites in the compiled graphs), and ``sus/c_of/<module>`` where
      the schedule gives each attention its own (``per="layer"``);
    - ``sus/kept_per_row``, ``sus/kept_fraction``: entries kept per query row, and of all that a dense backward uses;
    - ``sus/relative_variance`` (0.01 is an increase by 1%), also per kind of parameter (``sus/relative_variance_of/q``,
      ``k``, ``v``, ``o``, ``qkv``, ``rest``) and, with ``variance_per="layer"``, per layer;
      ``sus/worst_relative_variance`` (largest of the attention projections), ``sus/sus_variance``,
      ``sus/batch_variance``, ``sus/gradient_noise_scale``: see `GradientVariance`;
    - ``sus/step_speedup``: seconds of a step's forward and backward, exact over SUS, as the probe measured them, and
      ``sus/net_speedup``: the same divided by the penalty 1 + r x / (1 + x) in steps that the variance costs;
    - ``sus/summary_...``, when fit ends: variance, speed-up and seconds of `summary`, which is also printed.

    Works with ``lightning.pytorch`` and with ``pytorch_lightning``. It can be pickled and deep-copied, before, in and
    after ``fit``; what it made is then a callback that is not attached to any fit, with the same arguments, c and
    number of draws. (A lambda as schedule pickles with cloudpickle only.)

    Note:
        c and the number of draws so far are saved in checkpoints: a run that was resumed draws what the run without
        interruption would have drawn. So is the state of a schedule that has one (`AutoC`, `VarianceTarget`); a run may
        go on with another schedule, which starts anew.

    Args:
        c: expected number of kept entries per query row and head, above 0; ``float("inf")`` is the exact backward.
            "auto" is `AutoC`, which chooses it for the most progress per second. A schedule, a dict ``{step: c}`` or
            any callable of the global step sets it before each training step.
        sampler: "auto" ("tile" on a GPU, else "systematic"), "systematic" (one draw per row), "independent" (one per
            entry, as in the paper) or "tile" (whole tiles of 64 rows and 64 keys).
        compiler: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        variance_every_n_steps: optimizer steps between two probes; 0 turns them off; ``None`` is 200, or as many more
            as keep probes below 3% of the training time. The first probe is at step 1.
        variance_draws: SUS gradients per probe, at least 1. A probe costs ``2 + variance_draws`` forward and backward
            passes, two of them with the exact backward; with ``accumulate_grad_batches`` above 2 it costs that many
            instead of 2. With ``c="auto"`` it is one SUS pass more, at another c.
        seed: fixes the draws; ``None`` follows ``seed_everything``.
        mode: of ``torch.compile``, for modules that the user did not compile; ``compiler="inductor"`` only.
        modules: names of the submodules to compile; ``None`` is all children, and of a stack of equal blocks that take
            one argument the blocks, which share their graphs; "attention" is all blocks that repeat.
        forward: "auto", or "library" to keep the bits of PyTorch's own attention kernel.
        variance_per: "kind" logs the relative variance in total and per kind of parameter, "layer" per layer too,
            which is one more value for each layer.
        progress_bar: which of "step_speedup" and "net_speedup" the progress bar shows.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        MisconfigurationException: no attention was rewritten after the first training step, and the report says why;
            or the strategy is DeepSpeed.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from sus_lightning import LinearSchedule, SUSBackprop, VarianceTarget
        >>> trainer = Trainer(callbacks=[SUSBackprop()], logger=False)  # c chooses itself
        >>> SUSBackprop(c=30).c
        30.0
        >>> callback = SUSBackprop(c=LinearSchedule(256, 30, steps=2000))
        >>> callback = SUSBackprop(c=VarianceTarget(0.01))
        >>> callback = SUSBackprop(c=lambda step: 256 / (1 + step / 100))
    """

    def __init__(
        self,
        c: float | Literal["auto"] | Schedule | dict[int, float] | Callable[[int], float] = "auto",
        sampler: Sampler = "auto",
        compiler: Compiler = "inductor",
        variance_every_n_steps: int | None = None,
        variance_draws: int = 1,
        seed: int | None = None,
        mode: str | None = None,
        modules: list[str] | str | None = None,
        forward: Forward = "auto",
        variance_per: str = "kind",
        progress_bar: list[str] | None = None,
    ) -> None:
        self.schedule = AutoC() if isinstance(c, str) and c == "auto" else as_schedule(c)
        every = INTERVAL if variance_every_n_steps is None else variance_every_n_steps
        self.variance_every_n_steps = check_interval(every, self.schedule)
        self.variance_draws = check_count("variance_draws", variance_draws, at_least=1)
        check_choice("variance_per", variance_per, PER)
        self.variance_per = variance_per
        self._mode, self._modules = check_mode(mode, compiler), check_modules(modules)
        self._shown = check_progress_bar(progress_bar)
        start = self.schedule.c if isinstance(self.schedule, ConstantSchedule) else math.inf
        self.backend = SUSBackend(c=start, sampler=sampler, compiler=compiler, seed=seed, forward=forward)
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._compilation: Compilation | None = None
        self._probe: Probe | None = None
        self._first = FirstStep()
        self._by_blocks = True  # False once attention was found outside of the blocks of a stack
        self._earlier = EarlierBatches()
        self._pacing = Pacing(budgeted=variance_every_n_steps is None)
        self._variance: dict[str, float] = {}
        self._times: StepTimes | None = None
        self._account = Account()
        self._summary: Summary | None = None
        self._site_c: dict[int, float] = {}  # by number of the site: known before the sites are, after a resume
        self._warned = self._told = False
        self._share: tuple[int, float] | tuple[()] | None = None  # what `_attention_share` returned

    @property
    def c(self) -> float:
        """The c in use."""
        return self.backend.c

    @property
    def summary(self) -> Summary | None:
        """The summary of the last fit; None before one has ended."""
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
        self._pacing, self._variance = Pacing(self._pacing.budgeted), {}
        self._account, self._summary, self._by_blocks = Account(), None, True
        known = self._module() if self._module is not None else None
        if self.backend.report.sites:
            # The report of another fit would hide that nothing is found in this one, also in a module that has changed.
            self.backend = self.backend.for_another_model()
            self._site_c = {}
            if known is not pl_module and isinstance(self.schedule, AutoC):
                self.schedule.reset()  # what it knows is another model's time and variance
        self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: `configure_model` and the strategy, which may create and wrap modules, run after it.
        self._compilation = self._plan(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pacing.check_resumed(trainer.global_step, type(self).__name__)
        self._enable()
        self._account.start()
        if not self.variance_every_n_steps:
            return
        if not takes_batches(pl_module):
            stays = f" c stays at {self.schedule(0):g}." if observes(self.schedule) else ""
            rank_zero_warn(
                f"SUSBackprop measures no variance: training_step takes a dataloader_iter instead of a batch.{stays}"
            )
            return
        # Under manual optimization training_step holds the optimizers' steps, and with several ranks the backward
        # their communication: the probe's own passes do not.
        if pl_module.automatic_optimization and trainer.world_size == 1:
            self._times = StepTimes(Clock(pl_module.device))
        self._probe = Probe(trainer, pl_module, self.backend, self.variance_draws, self.variance_per)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disable()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._enable()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._earlier.new_epoch(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._set_c(step)
        if self._probe is not None:
            if self._earlier and self._is_due(step) and may_probe(trainer):
                self._observe(self._probe, batch, batch_idx, step, trainer)
                modules = attention_modules(self.schedule, self.backend.report)
                shares = {f"c_of/{name}": self.backend.state.c_of(sites[0]) for name, sites in modules.items()}
                publish(trainer, pl_module, {**self._variance, **shares}, ("relative_variance", *self._shown))
            near = self._is_due(step) or self._is_due(step + 1)
            self._earlier.keep(trainer, batch, batch_idx, needed=near)
        self._first.begin()
        self._account.note_c(step, self.backend.c)
        if not trainer.barebones:
            show(pl_module, {"c": self.backend.c}, ["c"])
        if self._times is not None:
            self._times.start(self.backend.c, batch)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        self._first.forward_is_over()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._times is not None:
            self._times.stop()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._first.forward_is_over()
        if self._compilation is not None and not self._first.is_over:
            ran = bool(outputs) or not pl_module.automatic_optimization  # a step may return None to be skipped
            if ran and not self._first.check(self.backend.report, pl_module, self._compilation):
                self._compile_whole(pl_module)
        if logs_now(trainer) and not accumulates(trainer):
            log_now(trainer, {"c": self.backend.c})
            values = self._kept(trainer)
            self._account.note_loss(trainer.global_step, outputs)
            if not values and not self._warned:
                self._warned = True
                warn_of_no_attention()
            values["attention_rewritten"] = float(self.backend.report.rewritten)
            publish(trainer, pl_module, values)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._disable()
        self._kept(trainer)
        if self._probe is not None and math.isinf(self.backend.c):
            self._say_nothing_is_gained()  # too few probes to have said so earlier
        summary = self._close(trainer)
        rank_zero_info(str(summary))
        log_now(trainer, summary.logged())

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._disable()
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._disable()
        if trainer.state.fn == "fit":
            self._close(trainer)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        return saved_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` had returned, of older versions too.

        Raises:
            TypeError, ValueError: a value is none that the callback can have had; the message names it.
        """
        load_saved_state(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return detached_state(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> SUSBackprop:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.backend)] = self.backend.separate_copy()  # a deepcopy would share c, draws and report
        vars(copy).update(deepcopy(self.__getstate__(), memo))
        return copy

    def _plan(self, pl_module: pl.LightningModule) -> Compilation:
        options = {} if self._mode is None else {"mode": self._mode}
        apart = self.backend.apart = per_layer(self.schedule)
        return plan(pl_module, self.backend, self._modules, options, apart, self._by_blocks)

    def _compile_whole(self, pl_module: pl.LightningModule) -> None:
        """Compiles anew: there is attention beside the blocks of a stack. The next step counts as the first."""
        assert self._compilation is not None
        self._compilation.clear()
        self._by_blocks, self.backend = False, self.backend.for_another_model()
        self._compilation = self._plan(pl_module)
        self._enable()
        if self._probe is not None:
            self._probe.backend = self.backend

    def _enable(self) -> None:
        if self._compilation is not None:
            self._compilation.enable()

    def _disable(self) -> None:
        if self._compilation is not None:
            self._compilation.disable()

    def _forget(self) -> None:
        if self._compilation is not None:
            self._compilation.clear()
        self._first.forward_is_over()
        self._compilation = self._probe = self._times = None
        self._first = FirstStep()
        self._earlier.clear()
        self._warned = self._told = False
        self._share = None

    def _set_c(self, step: int) -> None:
        state, c = self.backend.state, value_at(self.schedule, step)
        if (state.c, state.site_c) != (c, self._site_c):  # on a GPU, setting it copies to the device
            state.c = c
            state.set_site_c(self._site_c)

    def _observe(self, probe: Probe, batch: Any, batch_idx: int, step: int, trainer: pl.Trainer) -> None:
        """Probes, and lets the schedule adapt c."""
        schedule, c, step_seconds = self.schedule, self.backend.c, self._pacing.step_seconds(step)
        modules = attention_modules(schedule, self.backend.report)
        training = self._times.seconds(c, batch) if self._times is not None else []
        alone, at = measured_alone(schedule, modules), measured_at(schedule, modules)
        values = probe(batch, batch_idx, self._earlier, alone, at, training)
        speedups = self._account.note_probe(step, c, values, getattr(schedule, "on", "total"))
        if isinstance(schedule, Schedule):
            schedule.observe({**values, **speedups})
        self._site_c = site_c(schedule, modules)
        self._variance = to_be_logged(values) | speedups
        self._set_c(step)
        if isinstance(schedule, AutoC) and math.isinf(self.backend.c):
            if self._share is None:
                self._share = self._attention_share(probe, batch, batch_idx)
            if schedule.gains_nothing:
                self._say_nothing_is_gained()
        self._pacing.probed(trainer, step, values, step_seconds)

    def _attention_share(self, probe: Probe, batch: Any, batch_idx: int) -> tuple[int, float] | tuple[()]:
        """Keys of an attention row, and attention's backward in the operations of a step; nothing where not known."""
        self._disable()  # attention is counted in the module as it was given
        try:
            expected = probe.expectation(batch, batch_idx)
        finally:
            self._enable()
        return (expected.keys, expected.backward_share) if expected is not None and expected.calls else ()

    def _say_nothing_is_gained(self) -> None:
        if not self._told and isinstance(self.schedule, AutoC):
            self._told = True
            rank_zero_info(self.schedule.verdict(*(self._share or ())))

    def _kept(self, trainer: pl.Trainer) -> dict[str, float]:
        """Kept entries since the last call, over all ranks."""
        entries, rows, dense = pop_kept(trainer, self.backend.state)
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
        return self._pacing.is_due(step, self.variance_every_n_steps)
