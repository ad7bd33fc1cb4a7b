"""The HTTP server: what it accepts (limits, guard, connections), its routes, and how it computes (engine, batcher)."""
