"""SUS backprop for PyTorch Lightning: a callback, schedules of c, and gradient-variance metrics."""

from fx_passes import __version__
from sus_lightning.auto_c import AutoC
from sus_lightning.callback import SUSBackprop
from sus_lightning.metrics import GradientVariance
from sus_lightning.schedules import (
    ConstantSchedule,
    CosineSchedule,
    ExponentialSchedule,
    LinearSchedule,
    Schedule,
    StepSchedule,
)
from sus_lightning.variance_target import VarianceTarget

__all__ = [
    "AutoC",
    "ConstantSchedule",
    "CosineSchedule",
    "ExponentialSchedule",
    "GradientVariance",
    "LinearSchedule",
    "SUSBackprop",
    "Schedule",
    "StepSchedule",
    "VarianceTarget",
    "__version__",
]
