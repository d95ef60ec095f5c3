"""What a copy or a pickle of the callback has: nothing that belongs to a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sus_lightning.earlier_batches import EarlierBatches
from sus_lightning.rewritten import FirstStep

if TYPE_CHECKING:
    from sus_lightning.callback import SUSBackprop


def detached_state(callback: SUSBackprop) -> dict[str, Any]:
    """Its attributes without references to the module, compiled code and batches."""
    free: dict[str, Any] = dict.fromkeys(("_module", "_compilation", "_probe", "_times", "_share"))
    new = {"_first": FirstStep(), "_earlier": EarlierBatches(), "_warned": False, "_told": False}
    kept = {name: value for name, value in vars(callback).items() if name not in _OF_THE_MODULE}
    return {**kept, **free, **new}


_OF_THE_MODULE = ("log", "log_dict")  # methods of the module, which Lightning gives to callbacks
