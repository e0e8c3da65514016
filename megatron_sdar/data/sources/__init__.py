"""Records to documents: datasets, their layouts, their columns."""
