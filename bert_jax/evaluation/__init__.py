"""Evaluation: metrics, and models over examples and held-out texts."""
