"""`python -m megatron_sdar.doctor`: is this machine, and this configuration, ready to train?"""
