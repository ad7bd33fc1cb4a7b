"""Metrics, and the evaluation of models on examples and on held-out texts."""
