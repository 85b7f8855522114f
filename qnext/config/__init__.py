"""Frozen dataclasses that describe a model, its sampling defaults and a run; no torch."""
