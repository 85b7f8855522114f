"""Memory of running sequences: pages of keys and values, slots of DeltaNet states."""
