"""megatron_sdar: Megatron-style parallel trainer for SDAR block-diffusion language models."""

__version__ = "0.1.0"
