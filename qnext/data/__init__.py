"""From corpora to packed batches: sources, deduplication, shards, mixture, packing, loader."""
