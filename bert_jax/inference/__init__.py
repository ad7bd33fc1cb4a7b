"""Inference: pipelines, prediction from files, and a server."""
