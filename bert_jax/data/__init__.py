"""Reads data and makes batches of examples from it."""
