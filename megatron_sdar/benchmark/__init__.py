"""Measurements: ratios of things run in turn in one run, with the command that repeats them."""
