"""Measurements of single ops: time against the limit of the machine and against plain PyTorch."""
