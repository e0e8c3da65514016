"""Documents to the pieces of text that are tokenised apart."""
