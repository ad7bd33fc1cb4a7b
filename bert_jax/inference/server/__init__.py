"""The HTTP server.

The modules `limits`, `guard` and `connections` control access and enforce limits. The modules `tasks`, `openai` and
`tei` contain the routes, and `engine` and `batcher` compute the responses.
"""
