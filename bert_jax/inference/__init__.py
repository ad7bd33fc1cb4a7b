"""Inference: pipelines, files of inputs, a server."""
