"""Records to token files, token files to packed rows, rows to batches."""
