"""Block-diffusion sampling."""
