"""The gradient that one training step would give, without any trace in the trainer, the optimizers or `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn

from sus_lightning._lightning_compat import is_lightning_module, wrapped_optimizers
from sus_lightning.strategies import is_sharded

Gradients = list["Tensor | None"]


class StepGradient:
    """Computes gradients of ``training_step`` on given batches.

    Automatic optimization is differentiated by `torch.autograd.grad`, which neither writes `.grad` nor wakes DDP.
    `backward` into an exchanged `.grad` is used where that cannot work: manual optimization, sharded parameters, and
    activation checkpointing with ``use_reentrant=True``. Under manual optimization a step of an optimizer collects the
    gradients of its parameters, and does nothing else.

    Args:
        trainer: in fit.
        root: its LightningModule.
        parameters: those whose gradients are returned, in this order.
    """

    def __init__(self, trainer: pl.Trainer, root: pl.LightningModule, parameters: Sequence[nn.Parameter]) -> None:
        self.trainer, self.root, self.parameters = trainer, root, parameters
        self._reentrant = False

    def __call__(self, arguments: Mapping[str, Any]) -> Gradients | None:
        """Gradients on one batch; None where ``training_step`` skips it by returning None.

        Args:
            arguments: of ``training_step``.
        """
        with torch.enable_grad():
            if not self.root.automatic_optimization:
                return self._by_optimizers(arguments)
            if is_sharded(self.trainer) or self._reentrant:
                return self._by_backward(arguments)
            loss = self._loss(self._run(arguments))
            if loss is None:
                return None
            try:
                gradients = torch.autograd.grad(loss * self._scale(), self._trained(), allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                self._reentrant = True
                return self._by_backward(arguments)
            found = iter(gradients)
            return self._unscaled([next(found) if p.requires_grad else None for p in self.parameters])

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.parameters if p.requires_grad]

    def _reached(self) -> list[nn.Parameter]:
        """All that a backward may write into: those that train later too, and those that only an optimizer knows."""
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        return list(dict.fromkeys([*self.root.parameters(), *(p for group in groups for p in group["params"])]))

    def _run(self, arguments: Mapping[str, Any]) -> Any:
        if is_sharded(self.trainer):
            return self.trainer.strategy.training_step(*arguments.values())
        # Not through DDP's forward: it would arm the reducer and broadcast buffers.
        with self.trainer.precision_plugin.train_step_context():
            return self.root.training_step(*arguments.values())

    def _loss(self, output: Any) -> Tensor | None:
        return output.get("loss") if isinstance(output, Mapping) else output

    def _scale(self) -> float:
        """The factor that keeps float16 gradients from underflow, as the training step would use it."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None else 1.0

    def _unscaled(self, gradients: Gradients) -> Gradients:
        scale = self._scale()
        return gradients if scale == 1 else [None if g is None else g.float() / scale for g in gradients]

    def _by_backward(self, arguments: Mapping[str, Any]) -> Gradients | None:
        with exchanged_grads(self._reached()):
            loss = self._loss(self._run(arguments))
            if loss is None:
                return None
            (loss * self._scale()).backward()  # type: ignore[no-untyped-call]
            return self._unscaled([p.grad for p in self.parameters])

    def _by_optimizers(self, arguments: Mapping[str, Any]) -> Gradients:
        scale = self._scale()
        stepped: dict[nn.Parameter, Tensor] = {}

        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            (loss * scale).backward(*args, **kwargs)  # type: ignore[no-untyped-call]

        def step_of(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
            def step(closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
                output = closure() if closure is not None else None
                for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                    if parameter.grad is not None:
                        before = stepped.get(parameter)
                        stepped[parameter] = parameter.grad.clone() if before is None else before + parameter.grad
                return output

            return step

        with ExitStack() as stack:
            stack.enter_context(exchanged_grads(self._reached()))
            stack.enter_context(_replaced(self.root, manual_backward=manual_backward, clip_gradients=_nothing))
            for wrapped in wrapped_optimizers(self.trainer):
                step = step_of(wrapped.optimizer)
                stack.enter_context(_replaced(wrapped, step=step))
                stack.enter_context(_replaced(wrapped.optimizer, step=step))
            for config in self.trainer.lr_scheduler_configs:
                stack.enter_context(_replaced(config.scheduler, step=_nothing))
            self._run(arguments)
            return self._unscaled([stepped.get(p, p.grad) for p in self.parameters])


@contextmanager
def exchanged_grads(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it `.grad` is None at first; afterwards it is what it was, the same tensor with the same values."""
    before = [p.grad for p in parameters]
    hooks = [p._post_accumulate_grad_hooks for p in parameters]
    try:
        for p in parameters:
            p.grad = None
            p._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # an optimizer that steps within backward would train here
        yield
    finally:
        for p, grad, hook in zip(parameters, before, hooks, strict=True):
            p.grad = grad
            p._post_accumulate_grad_hooks = hook


@contextmanager
def muted(trainer: pl.Trainer, root: pl.LightningModule) -> Iterator[None]:
    """Within it ``self.log``, ``self.log_dict`` and ``self.logger`` of all LightningModules do nothing."""
    loggers = trainer.loggers
    with ExitStack() as stack:
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        for module in root.modules():
            if is_lightning_module(module):
                stack.enter_context(_replaced(module, log=_nothing, log_dict=_nothing))
        yield


@contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Within it the instance attributes of `owner` are the given ones."""
    attributes = vars(owner)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            attributes.pop(name, None)
        attributes.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None
