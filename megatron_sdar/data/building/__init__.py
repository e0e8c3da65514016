"""Datasets to token files: in parts, on many processes and machines."""
