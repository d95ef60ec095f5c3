"""SUSBackprop: trains a LightningModule with a SUS backward."""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from numbers import Real
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from fx_passes import SUSBackend
from fx_passes.ops.functional import check_choice
from fx_passes.report import REWRITTEN, Site
from fx_passes.state import Kept, check_c, check_counter, shown
from sus_lightning._lightning_compat import (
    AnyCallback,
    MisconfigurationException,
    accumulates,
    logged_step,
    logs_now,
)
from sus_lightning.compilation import Compilation, plan
from sus_lightning.metrics import PER
from sus_lightning.probe import Probe, copied
from sus_lightning.saved import Saved, check_name
from sus_lightning.schedules import ConstantSchedule, Schedule, as_schedule, check_count, schedule_name, value_at
from sus_lightning.strategies import check_strategy
from sus_lightning.unseen import Unseen, watch
from sus_lightning.variance_target import ALONE, VarianceTarget


class SUSBackprop(AnyCallback):
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
      ``k``, ``v``, ``o``, ``qkv``, ``rest``) and, with ``variance_per="layer"``, per layer;
      ``sus/worst_relative_variance`` (largest of the attention projections), ``sus/sus_variance``,
      ``sus/batch_variance``, ``sus/gradient_noise_scale``: see :class:`~sus_lightning.GradientVariance`.

    Works with ``lightning.pytorch`` and with ``pytorch_lightning``. It can be pickled and deep-copied, before, in and
    after ``fit``; what it made is then a callback that is not attached to any fit, with the same arguments, c and
    number of draws. (A lambda as schedule pickles with cloudpickle only.)

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

        trainer = Trainer(callbacks=[SUSBackprop(c=30)])
        trainer = Trainer(callbacks=[SUSBackprop(c=LinearSchedule(256, 30, steps=2000))])
        trainer = Trainer(callbacks=[SUSBackprop(c=VarianceTarget(0.01))])
        trainer = Trainer(callbacks=[SUSBackprop(c=lambda step: 256 / (1 + step / 100))])

    Args:
        c: expected number of kept entries per query row and head, above 0; ``float("inf")`` is the exact backward.
            A schedule, a dict ``{step: c}`` or any callable of the global step sets it before each training step,
            without recompilation.
        sampler: "auto" ("tile" on a GPU, else "systematic"), "systematic" (one draw per row), "independent" (one per
            entry, as in the paper) or "tile" (whole tiles of 64 rows and 64 keys).
        compiler: what runs the rewritten graphs: "inductor", "aot_eager" or "eager".
        variance_every_n_steps: optimizer steps between two probes; 0 turns them off. The first probe is at step 1.
        variance_draws: SUS gradients per probe, at least 1. A probe costs ``2 + variance_draws`` forward and backward
            passes, two of them with the exact backward; with ``accumulate_grad_batches`` above 2 it costs that many
            instead of 2.
        seed: fixes the draws; ``None`` follows ``seed_everything``.
        mode: of ``torch.compile``, for modules that the user did not compile; ``compiler="inductor"`` only.
        modules: names of the submodules to compile; ``None`` is all children. "attention" is the blocks that repeat in
            a model, such as its layers, and where there are none the children: equal blocks then share their graphs,
            and a deep model compiles in a fraction of the time.
        forward: "auto", or "library" to keep the bits of PyTorch's own attention kernel.
        variance_per: "kind" logs the relative variance in total and per kind of parameter, "layer" per layer too,
            which is one more value for each layer.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        MisconfigurationException: no attention was rewritten, or the strategy is DeepSpeed.

    """

    def __init__(
        self,
        c: float | Schedule | dict[int, float] | Callable[[int], float] = 30.0,
        sampler: str = "auto",
        compiler: str = "inductor",
        variance_every_n_steps: int = 200,
        variance_draws: int = 1,
        seed: int | None = None,
        mode: str | None = None,
        modules: list[str] | str | None = None,
        forward: str = "auto",
        variance_per: str = "kind",
    ) -> None:
        self.schedule = as_schedule(c)
        self.variance_every_n_steps = check_count("variance_every_n_steps", variance_every_n_steps)
        self.variance_draws = check_count("variance_draws", variance_draws, at_least=1)
        check_choice("variance_per", variance_per, PER)
        self.variance_per = variance_per
        self._mode, self._modules = _check_mode(mode, compiler), _check_modules(modules)
        start = self.schedule.c if isinstance(self.schedule, ConstantSchedule) else math.inf
        self.backend = SUSBackend(c=start, sampler=sampler, compiler=compiler, seed=seed, forward=forward)
        self._module: weakref.ref[pl.LightningModule] | None = None
        self._compilation: Compilation | None = None
        self._probe: Probe | None = None
        self._unseen: Unseen | None = None
        self._earlier: deque[tuple[Any, int]] = deque()
        self._probed_step = 0
        self._variance: dict[str, float] = {}
        self._site_c: dict[int, float] = {}  # by number of the site: known before the sites are, after a resume
        self._checked = self._warned = False
        if _observes(self.schedule) and not self.variance_every_n_steps:
            raise ValueError(
                f"variance_every_n_steps must be above 0 for c={schedule_name(self.schedule)}, which adapts c from the "
                f"probes, but it is 0"
            )

    @property
    def c(self) -> float:
        """The c in use."""
        return self.backend.c

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_strategy(trainer)
        self._forget()
        self._probed_step, self._variance = 0, {}
        known = self._module() if self._module is not None else None
        if known is not pl_module and self.backend.report.sites:
            # The report of another module would hide that nothing is found in this one.
            self.backend = _another(self.backend)
            self._site_c = {}
        self._module = weakref.ref(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not in `setup`: `configure_model` and the strategy, which may create and wrap modules, run after it.
        options = {} if self._mode is None else {"mode": self._mode}
        self.backend.apart = self._per_layer
        self._compilation = plan(pl_module, self.backend, self._modules, options, self._per_layer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._probed_step > trainer.global_step:
            raise ValueError(
                f"the saved state of {type(self).__name__}: probed_step must be at most the global step "
                f"{trainer.global_step} at which training goes on, but it is {self._probed_step}"
            )
        self._enable()
        if not self.variance_every_n_steps:
            return
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            rank_zero_warn(
                "SUSBackprop measures no variance: training_step takes a dataloader_iter instead of a batch."
            )
            return
        self._probe = Probe(trainer, pl_module, self.backend, self.variance_draws, self.variance_per)

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
                self._observe(self._probe, batch, batch_idx, step)
                shares = {f"c_of/{name}": self.backend.state.c_of(sites[0]) for name, sites in self._shared().items()}
                self._publish(trainer, pl_module, {**self._variance, **shares}, shown=("relative_variance",))
            self._keep(trainer, batch, batch_idx)
        if not self._checked and self._unseen is None:
            self._unseen = watch()
        if not trainer.barebones:
            pl_module.log("sus/c", self.backend.c, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor) -> None:
        if self._unseen is not None:
            self._unseen.close()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._unseen is not None:
            self._unseen.close()
        if not self._checked and (outputs is not None or not pl_module.automatic_optimization):
            self._checked = True
            self._check_rewritten(pl_module)
        if logs_now(trainer) and not accumulates(trainer):
            self._log_now(trainer, {"c": self.backend.c})
            values = _kept(trainer, self.backend.state.pop_kept())
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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._disable()
        self._forget()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._disable()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        counter, number = self.backend.state.position
        state: dict[str, Any] = {
            "c": self.backend.c,
            "site_c": dict(self._site_c),
            "counter": counter,
            "number": number,
            "probed_step": self._probed_step,
            "variance": dict(self._variance),
        }
        if isinstance(self.schedule, Schedule):
            state["schedule"] = self.schedule.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what `state_dict` had returned, of older versions too.

        Raises:
            TypeError, ValueError: a value is none that the callback can have had; the message names it.
        """
        saved, state = Saved(state_dict, type(self).__name__), self.backend.state
        c = saved.read("c", lambda name, value: check_c(value, name), self.backend.c)
        site_c = saved.read_dict("site_c", check_count, lambda name, value: check_c(value, name), {})
        counter = saved.read("counter", lambda name, value: check_counter(value, name), 0)
        number = saved.read("number", lambda name, value: None if value is None else check_counter(value, name), None)
        probed_step = saved.read("probed_step", check_count, 0)
        variance = saved.read_dict("variance", check_name, _check_real, {})
        if isinstance(self.schedule, Schedule) and "schedule" in saved and state_dict["schedule"]:
            self.schedule.load_state_dict(state_dict["schedule"])
        self.backend.c = c
        self._site_c = site_c if self._per_layer else {}
        state.resume(counter, number)
        self._probed_step, self._variance = probed_step, variance

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a fit: references to the module, compiled code and batches."""
        free: dict[str, Any] = {"_module": None, "_compilation": None, "_probe": None, "_earlier": deque()}
        return {**vars(self), **free, "_checked": False, "_warned": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> SUSBackprop:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.backend)] = self.backend.separate_copy()  # a deepcopy would share c, draws and report
        vars(copy).update(deepcopy(self.__getstate__(), memo))
        return copy

    def _enable(self) -> None:
        if self._compilation is not None:
            self._compilation.enable()

    def _disable(self) -> None:
        if self._compilation is not None:
            self._compilation.disable()

    def _forget(self) -> None:
        if self._compilation is not None:
            self._compilation.clear()
        if self._unseen is not None:
            self._unseen.close()
        self._compilation = self._probe = self._unseen = None
        self._earlier.clear()
        self._checked = self._warned = False

    @property
    def _per_layer(self) -> bool:
        return isinstance(self.schedule, VarianceTarget) and self.schedule.per == "layer"

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

    def _observe(self, probe: Probe, batch: Any, batch_idx: int, step: int) -> None:
        """Probes, and lets the schedule adapt c."""
        shared = self._shared()
        alone = self.schedule.measure(list(shared)) if isinstance(self.schedule, VarianceTarget) else []
        values = probe(batch, batch_idx, self._earlier, {name: shared[name] for name in alone})
        if isinstance(self.schedule, Schedule):
            self.schedule.observe(values)
        if isinstance(self.schedule, VarianceTarget):
            self._site_c = {n: self.schedule.c_of(name) for name, numbers in shared.items() for n in numbers}
        self._variance = {name: value for name, value in values.items() if not name.startswith(ALONE)}
        self._probed_step = step
        self._set_c(step)

    def _is_due(self, step: int) -> bool:
        """Whether a probe belongs to this step, or to an earlier one at which it was not possible."""
        every = self.variance_every_n_steps
        return step >= 1 and (step - 1) // every > (self._probed_step - 1) // every

    def _may_probe(self, trainer: pl.Trainer) -> bool:
        """Whether this batch completes an optimizer step and has the size of the others."""
        odd = trainer.is_last_batch and trainer.num_training_batches > 2
        return not odd and not accumulates(trainer)

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
        unseen = self._unseen.names(pl_module) if self._unseen is not None else []
        self._unseen = None
        if report.rewritten:
            rank_zero_info(f"SUSBackprop: {report}")
            without = [_described(site) for site in report.sites if site.status != REWRITTEN] + unseen
            if without:
                rank_zero_warn(
                    f"SUSBackprop: {report.rewritten} of {report.rewritten + report.left + len(unseen)} attentions of "
                    f"this model train with SUS; these do not: {', '.join(without)}"
                )
            return
        ran = f" Attention ran in {', '.join(unseen)}." if unseen else ""
        raise MisconfigurationException(
            f"SUSBackprop rewrote no attention of {type(pl_module).__name__}: it would train without SUS. Compiled "
            f"were the submodules {modules}.{ran} Attention that is computed in the LightningModule's own methods, or "
            f"in a method other than forward of a submodule, is not seen: move it into the forward of a submodule.\n"
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
            logger.log_metrics(named, step=logged_step(trainer))


def _another(old: SUSBackend) -> SUSBackend:
    """A backend with the options, c and number of draws of this one, for another module."""
    backend = SUSBackend(old.c, old.sampler, old.compiler, old.state.seed, old.forward)
    backend.state.counter = old.state.counter
    return backend


def _described(site: Site) -> str:
    place = " ".join(part for part in (site.module, f"({site.source})" if site.source else "") if part)
    return f"{place or site.form}: {site.reason}"


def _kept(trainer: pl.Trainer, kept: Kept) -> dict[str, float]:
    counts = torch.tensor([kept.entries, kept.rows, kept.dense], device=trainer.strategy.root_device)
    entries, rows, dense = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return {"kept_per_row": entries / rows, "kept_fraction": entries / dense} if rows else {}


def _observes(schedule: Callable[[int], float]) -> bool:
    return isinstance(schedule, Schedule) and type(schedule).observe is not Schedule.observe


def _check_real(name: str, value: Any) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, but it is {shown(value)}")
    return float(value)


def _check_mode(mode: Any, compiler: str) -> str | None:
    if mode is None:
        return None
    allowed = list(torch._inductor.list_mode_options())
    if mode not in allowed:
        raise ValueError(f"mode must be None or one of {', '.join(map(repr, allowed))}, but it is {mode!r}")
    if compiler != "inductor":
        raise ValueError(f"mode is for compiler='inductor' only, but mode is {mode!r} and compiler is {compiler!r}")
    return str(mode)


def _check_modules(modules: Any) -> list[str] | str | None:
    if modules is None or (isinstance(modules, str) and modules == "attention"):
        return modules
    if isinstance(modules, str) or not isinstance(modules, Sequence) or not all(isinstance(m, str) for m in modules):
        raise TypeError(f"modules must be a list of names of submodules, 'attention' or None, but it is {modules!r}")
    if not modules:
        raise ValueError("modules must name at least one submodule, but it is empty")
    return list(modules)
