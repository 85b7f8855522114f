"""What `qnext bench` measures on one device: kernels, serving and training."""
