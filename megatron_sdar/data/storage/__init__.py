"""Token files: Megatron-LM's format, labels and turns beside it, metadata."""
