"""Evaluation: metrics, and evaluation of models on examples and on held-out texts."""
