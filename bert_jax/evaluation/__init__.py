"""Computes metrics and evaluates models on examples and held-out texts."""
