"""Parameter groups, learning-rate schedules, global-norm clipping."""
