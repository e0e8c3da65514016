"""Tensor kernels of block diffusion: functions on tensors, no modules, no process groups."""
