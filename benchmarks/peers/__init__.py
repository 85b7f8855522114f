"""Engines under measurement, each in a process of its own: one JSON line in, one JSON line out."""
