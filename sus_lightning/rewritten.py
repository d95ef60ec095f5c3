"""What is said after the first training step: which attentions train with SUS, and which do not."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from fx_passes.report import REWRITTEN, Report, Site
from sus_lightning._lightning_compat import MisconfigurationException


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


def _described(site: Site) -> str:
    place = " ".join(part for part in (site.module, f"({site.source})" if site.source else "") if part)
    return f"{place or site.form}: {site.reason}"
