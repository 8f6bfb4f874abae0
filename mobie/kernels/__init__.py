"""Kernels for packed models: layouts in memory, operations in torch, Triton and C++, and how a model gets them."""
