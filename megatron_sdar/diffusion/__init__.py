"""Block diffusion as pure functions of arrays: noise, row layout, loss weights."""
