"""Inference: pipelines, prediction of files, and a server."""
