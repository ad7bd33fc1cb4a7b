"""Reads data and converts it to batches of examples."""
