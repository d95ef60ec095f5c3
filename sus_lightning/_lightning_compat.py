"""Everything that depends on which Lightning a project imports, and on what Lightning keeps to itself.

The package exists twice, as ``lightning.pytorch`` and as ``pytorch_lightning``: the same code but other classes, so
that no ``isinstance`` of one holds for objects of the other. A project may use either, or both in one process.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities import exceptions

try:
    import pytorch_lightning
    from lightning_fabric.utilities import exceptions as standalone_exceptions
except Exception:  # not installed, or a version that fails with this torch: then nobody uses it
    pytorch_lightning = None  # type: ignore[assignment]

# Attributes of a LightningModule that a training step does not change.
OWN_ATTRIBUTES = frozenset({"_trainer", "_fabric", "_compiler_ctx"})

if TYPE_CHECKING:
    AnyCallback = pl.Callback
    MisconfigurationException = exceptions.MisconfigurationException
else:
    _twice = pytorch_lightning is not None
    # A callback and an exception of both packages: ``Trainer(callbacks=callback)``, LightningCLI's types and the
    # ``except`` of a project ask for its own.
    AnyCallback = type(
        "AnyCallback", (pl.Callback, *([pytorch_lightning.Callback] if _twice else [])), {"__module__": __name__}
    )
    MisconfigurationException = type(
        "MisconfigurationException",
        (
            exceptions.MisconfigurationException,
            *([standalone_exceptions.MisconfigurationException] if _twice else []),
        ),
        {"__module__": __name__},
    )


def is_lightning_module(module: Any) -> bool:
    """Whether it is a LightningModule of either package."""
    return _is_any(module, "", "LightningModule")


def is_strategy(strategy: Any, *names: str) -> bool:
    """Whether a Trainer's strategy is of one of these classes, of either package."""
    return any(_is_any(strategy, ".strategies", name) for name in names)


def _is_any(value: Any, where: str, name: str) -> bool:
    # Only what is imported can have instances.
    modules = [sys.modules.get(package + where) for package in ("lightning.pytorch", "pytorch_lightning")]
    classes = tuple(found for module in modules if isinstance(found := getattr(module, name, None), type))
    return isinstance(value, classes)


def compiled_as(module: pl.LightningModule) -> tuple[Any, dict[str, Any]]:
    """What ``torch.compile(lightning_module)`` made of a module, or None, and the methods that it replaced, by name."""
    context = module._compiler_ctx
    if context is None:
        return None, {}
    return context["dynamo_ctx"], {name: context[f"original_{name}"] for name in ("forward", "training_step")}


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether ``log_every_n_steps`` makes the loggers write at this step."""
    return bool(trainer._logger_connector.should_update_logs)


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether the batch at hand is one after which the optimizer does not step."""
    return bool(trainer.fit_loop._should_accumulate())


def logged_step(trainer: pl.Trainer) -> int:
    """The step under which Lightning itself writes to loggers; it counts a step of several optimizers once."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def wrapped_optimizers(trainer: pl.Trainer) -> list[Any]:
    """The LightningOptimizers that ``self.optimizers()`` returns."""
    return list(trainer.strategy._lightning_optimizers)
