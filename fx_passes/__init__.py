"""SUS backprop as a torch.compile pass: finds softmax attention and gives it a sparse, unbiased backward."""

from fx_passes._version import __version__
from fx_passes.backend import SUSBackend
from fx_passes.eager import sus_backward
from fx_passes.explain import explain
from fx_passes.ops.functional import sus_attention
from fx_passes.report import Report, Site

__all__ = ["Report", "SUSBackend", "Site", "__version__", "explain", "sus_attention", "sus_backward"]
