"""SDAR (Qwen3 architecture) built from the parallel layers."""
