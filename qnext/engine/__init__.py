"""Generation: requests in, tokens out, with pages, slots and speculative decoding."""
