"""Files to records: every format, with the place of each record."""
