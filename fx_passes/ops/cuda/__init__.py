"""Triton kernels for CUDA devices from sm_80. `support` says for which calls; only `attention` imports Triton."""
