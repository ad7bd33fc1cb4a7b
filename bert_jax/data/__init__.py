"""Examples: their sources, and the batches made from them."""
