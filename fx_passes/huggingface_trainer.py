"""SUSTrainerCallback: transformers' Trainer with a SUS backward."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from fx_passes.backend import Compiler, SUSBackend
from fx_passes.ops.problem import Forward, Sampler
from fx_passes.state import State, as_int, check_c, shown

# Past Dynamo's own limit of 8 it would run attention uncompiled, hence without SUS.
_RECOMPILE_LIMIT = 64
_SCHEDULE = "a schedule"  # stands for one in a checkpoint, which is JSON
_Schedule = float | dict[int, float] | Callable[[int], float]


class SUSTrainerCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Trains any model of transformers' ``Trainer`` with the sparse, unbiased backward of SUS backprop.

    While ``train`` runs, the model is compiled in place by a `fx_passes.SUSBackend`; calls without gradient
    (evaluation, generation) run it as it was. A model with ``attn_implementation="sus"`` is not compiled: then the
    callback sets the c of its `register_sus_attention`. ``TrainingArguments(torch_compile=True)`` is fine: what
    it compiled is compiled with this backend instead.

    After the first forward and backward the report of what was found is printed; if no attention was rewritten,
    training stops with that report. Whenever the Trainer logs its loss, ``sus/c``, ``sus/attention_rewritten``,
    ``sus/kept_per_row`` and ``sus/kept_fraction`` are logged by ``Trainer.log``. c and the number of draws are saved
    in checkpoints, and a resumed run draws what the run without interruption would have drawn.

    Args:
        c: expected number of kept entries per query row and head, above 0; ``float("inf")`` is the exact backward. A
            dict ``{step: c}`` or any callable of the global step, such as the schedules of `sus_lightning`, sets it
            before each optimizer step. (Those that adapt to probes need Lightning.)
        sampler: as for `SUSBackend`.
        compiler: as for `SUSBackend`.
        seed: as for `SUSBackend`.
        forward: as for `SUSBackend`.

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.
        RuntimeError: in training, if no attention was rewritten.

    Examples:
        ``Trainer(model, args, train_dataset=data, callbacks=[SUSTrainerCallback(c=30)])``

        >>> from fx_passes.huggingface import SUSTrainerCallback
        >>> SUSTrainerCallback(c={0: 256, 1000: 30}).c
        256.0
    """

    def __init__(
        self,
        c: float | Mapping[int, float] | Callable[[int], float] = 30.0,
        sampler: Sampler = "auto",
        compiler: Compiler = "inductor",
        seed: int | None = None,
        forward: Forward = "auto",
    ) -> None:
        self._schedule = _checked(c)
        self.backend = SUSBackend(_at(self._schedule, 0), sampler, compiler, seed, forward)
        plain = self._schedule if isinstance(self._schedule, float) else _SCHEDULE
        options = {"sampler": sampler, "compiler": compiler, "seed": seed, "forward": forward}
        self._arguments: dict[str, Any] = {"c": plain, **options}
        self._trainer: Trainer | None = None
        self._undo: list[Callable[[], Any]] = []
        self._registered: State | None = None
        self._reported = self._logging = False
        self.saved: dict[str, Any] | None = None  # of a checkpoint, where the Trainer restores callbacks itself

    @property
    def c(self) -> float:
        """The c in use."""
        return self._state.c

    @property
    def _state(self) -> State:
        return self.backend.state if self._registered is None else self._registered

    def state(self) -> dict[str, Any]:
        """For the checkpoint, as transformers wants it."""
        counter, number = self._state.position
        saved = {"c": self.c, "counter": counter, "number": number}
        return {"args": self._arguments, "attributes": {"saved": saved}}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None, "_undo": [], "_registered": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SUSTrainerCallback:
        copy: SUSTrainerCallback = type(self).__new__(type(self))
        memo[id(self)] = copy
        memo[id(self.backend)] = self.backend.separate_copy()
        copy.__dict__.update(deepcopy(self.__getstate__(), memo))
        return copy

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._restore()
        self._trainer, self._reported = _calling_trainer(), False
        registered = _registered_state(model)
        self._registered = registered
        if self.backend.report.sites:  # of another training; they would hide that nothing is found in this model
            self.backend = self.backend.for_another_model()
        known = state.stateful_callbacks.get(type(self).__name__)  # of the checkpoint that is resumed from
        known = known[0] if isinstance(known, list) else known
        self.saved = self.saved or (known or {}).get("attributes", {}).get("saved")
        if registered is None:
            self._install(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.saved:  # not earlier: the Trainer restores the generators, which may be those of another run
            self._state.resume(int(self.saved["counter"]), self.saved.get("number"))
            self.saved = None
        c = _at(self._schedule, state.global_step)
        if c != self._state.c:
            self._state.c = c

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if (not self._undo and self._registered is None) or "loss" not in (logs or {}) or self._logging:
            return
        values = self._values(args.device)
        self._logging = True
        try:
            if self._trainer is not None:
                self._trainer.log(values)
            else:  # called by something else than a Trainer
                logs.update(values)
        finally:
            self._logging = False

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._restore()

    def _install(self, model: nn.Module) -> None:
        wrapped = model if self._trainer is None else self._trainer.model_wrapped
        compiled = [m for m in wrapped.modules() if isinstance(m, OptimizedModule)]
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, _RECOMPILE_LIMIT)
        self._undo.append(lambda: setattr(torch._dynamo.config, "recompile_limit", limit))
        for module in compiled:
            self._exchange(module, "forward", module._orig_mod._call_impl)
        if not compiled:
            self._exchange(model, "_compiled_call_impl", model._call_impl)

    def _exchange(self, module: nn.Module, name: str, original: Callable[..., Any]) -> None:
        """Puts compiled code under an attribute of one module. Not by setattr, which OptimizedModule redirects."""
        attributes = vars(module)
        before = attributes.get(name)
        attributes[name] = _where_gradients_are(torch.compile(original, backend=self.backend), original)
        self._undo.append(lambda: attributes.pop(name, None) if before is None else attributes.update({name: before}))

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _report(self, state: Any) -> None:
        if self._reported:
            return
        self._reported = True
        if self._registered is not None:
            found = 'the model has attn_implementation="sus"'
        else:
            found = str(self.backend.report)
            if not self.backend.report.rewritten:
                self._restore()
                raise RuntimeError(f"SUSTrainerCallback rewrote no attention: it would train without SUS.\n{found}")
        if state.is_world_process_zero:
            print(f"SUSTrainerCallback: {found}", flush=True)

    def _values(self, device: torch.device) -> dict[str, float]:
        kept = self._state.pop_kept()
        counts = torch.tensor([kept.entries, kept.rows, kept.dense], dtype=torch.float64, device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        entries, rows, dense = counts.tolist()
        values = {"sus/c": self.c}
        if self._registered is None:
            values["sus/attention_rewritten"] = float(self.backend.report.rewritten)
        return values | ({"sus/kept_per_row": entries / rows, "sus/kept_fraction": entries / dense} if rows else {})


def _where_gradients_are(compiled: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else original)(*args, **kwargs)

    return call


def _registered_state(model: Any) -> State | None:
    """The state of the `register_sus_attention` that a model with ``attn_implementation="sus"`` uses."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "sus":
        return None
    from transformers import AttentionInterface

    found: State = AttentionInterface()["sus"].__self__.state
    return found


def _calling_trainer() -> Trainer | None:
    """The Trainer whose event is being handled. transformers hands everything to callbacks but the Trainer."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


def _checked(c: Any) -> _Schedule:
    if isinstance(c, str) and c == _SCHEDULE:
        raise ValueError(
            "c must be given again: a checkpoint holds no schedule. Leave restore_callback_states_from_checkpoint "
            "False; the SUSTrainerCallback that is passed to the Trainer goes on from the checkpoint by itself."
        )
    if isinstance(c, Mapping):
        steps = dict(sorted({_step(step): check_c(value, f"c[{step}]") for step, value in c.items()}.items()))
        if 0 not in steps:
            raise ValueError(f"c must say what it is at step 0, but its steps are {list(steps)}")
        return steps
    if callable(c):
        adapts = [k for k in type(c).__mro__ if "observe" in vars(k) and k.__name__ != "Schedule"]
        if adapts:
            raise ValueError(f"c must not be {c!r}: it adapts to the probes of sus_lightning.SUSBackprop")
        return c  # type: ignore[no-any-return]
    return check_c(c)


def _at(schedule: _Schedule, step: int) -> float:
    if isinstance(schedule, float):
        return schedule
    if callable(schedule):
        return check_c(schedule(step), f"the c that the schedule returned for step {step}")
    return schedule[max(s for s in schedule if s <= step)]


def _step(step: Any) -> int:
    number = as_int(step)
    if number is None or number < 0:
        raise TypeError(f"the keys of c must be steps, ints of at least 0, but one is {shown(step)}")
    return number
