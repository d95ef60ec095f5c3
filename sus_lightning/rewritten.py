"""What is said after the first training step: which attentions train with SUS, and which do not."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from fx_passes.report import REWRITTEN, Report, Site
from sus_lightning._lightning_compat import MisconfigurationException
from sus_lightning.compilation import Compilation
from sus_lightning.unseen import Unseen, watch


class FirstStep:
    """Watches the first training step for attention that runs in no compiled graph, and says what trains with SUS."""

    def __init__(self) -> None:
        self.is_over = False
        self._unseen: Unseen | None = None

    def begin(self) -> None:
        """Before the forward of a step."""
        if not self.is_over and self._unseen is None:
            self._unseen = watch()

    def forward_is_over(self) -> None:
        if self._unseen is not None:
            self._unseen.close()

    def check(self, report: Report, root: nn.Module, compilation: Compilation) -> bool:
        """Shows what was rewritten.

        Returns:
            False, having said nothing, if attention ran outside of blocks that had been chosen for the user: then the
            whole children are to be compiled, and the step after this one is the first.

        Raises:
            MisconfigurationException: no attention was rewritten.
        """
        self.forward_is_over()
        unseen, self._unseen = self._unseen, None
        if compilation.by_blocks and unseen is not None and unseen.is_below(root):
            return False
        self.is_over = True
        names = unseen.names(root) if unseen is not None else []
        check_rewritten(report, type(root).__name__, compilation.modules, names)
        return True


def check_rewritten(report: Report, module: str, compiled: Sequence[str], unseen: Sequence[str]) -> None:
    """Shows what was rewritten, and warns of what was not.

    Args:
        report: of the backend.
        module: name of the LightningModule's class.
        compiled: names of the submodules that were compiled.
        unseen: attentions that ran outside of all graphs.

    Raises:
        MisconfigurationException: no attention was rewritten.
    """
    if not report.rewritten:
        ran = f" Attention ran in {', '.join(unseen)}." if unseen else ""
        raise MisconfigurationException(
            f"SUSBackprop rewrote no attention of {module}: it would train without SUS. Compiled "
            f"were the submodules {compiled}.{ran} Attention that is computed in the LightningModule's own methods, or "
            f"in a method other than forward of a submodule, is not seen: move it into the forward of a submodule.\n"
            f"{report}"
        )
    rank_zero_info(f"SUSBackprop: {report}")
    without = [*(_described(site) for site in report.sites if site.status != REWRITTEN), *unseen]
    if without:
        rank_zero_warn(
            f"SUSBackprop: {report.rewritten} of {report.rewritten + report.left + len(unseen)} attentions of "
            f"this model train with SUS; these do not: {', '.join(without)}"
        )


def warn_of_no_attention() -> None:
    rank_zero_warn(
        "SUSBackprop: no attention has had a SUS backward since c was last logged. Steps may have been skipped. If "
        "they were not, Dynamo may have reached its recompile limit: TORCH_LOGS=recompiles says why it recompiles."
    )


def _described(site: Site) -> str:
    place = " ".join(part for part in (site.module, f"({site.source})" if site.source else "") if part)
    return f"{place or site.form}: {site.reason}"
