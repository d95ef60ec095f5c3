"""The native CPU kernel: flash forward that samples, sparse backward. C++ in src/, compiled on first use."""

from fx_passes.ops.cpu.kernel import backward, forward, release_memory, sample, samples, supports, unsupported

__all__ = ["backward", "forward", "release_memory", "sample", "samples", "supports", "unsupported"]
