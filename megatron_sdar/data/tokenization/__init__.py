"""Text to ids: the tokenizers library and its fast equal."""
