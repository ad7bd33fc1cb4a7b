"""The HTTP server: access and limits (limits, guard, connections), routes, and computation (engine, batcher)."""
