"""Checkpoints as tensors with names: shapes, shards, configs, atomic writes; no nn.Module."""
