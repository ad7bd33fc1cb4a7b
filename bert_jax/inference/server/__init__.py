"""The HTTP server.

It consists of access and limits (`limits`, `guard`, `connections`), routes, and computation (`engine`, `batcher`).
"""
