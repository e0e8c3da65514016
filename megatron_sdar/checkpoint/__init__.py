"""Native (DCP) checkpoints and Hugging Face safetensors."""
