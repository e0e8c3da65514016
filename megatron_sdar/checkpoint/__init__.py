"""Native checkpoints and Hugging Face safetensors."""
