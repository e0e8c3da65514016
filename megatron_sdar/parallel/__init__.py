"""The only package that talks to torch.distributed."""
