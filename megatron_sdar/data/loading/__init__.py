"""Token files to rows in training order."""
