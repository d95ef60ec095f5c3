"""SUS backprop as a torch.compile pass: finds softmax attention and gives it a sparse, unbiased backward."""

from fx_passes.ops.functional import sus_attention

__all__ = ["sus_attention"]
