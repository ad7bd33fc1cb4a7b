"""The `bert-jax` command line. Each command imports only what it needs."""

from bert_jax.cli import inference, training, files  # noqa: F401, I001  # in the order shown by --help
from bert_jax.cli.options import app, main

__all__ = ["app", "main"]
