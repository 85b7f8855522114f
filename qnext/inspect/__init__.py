"""Looking at a model without running it: sizes, memory, drawings, names; no torch."""
