"""Tasks, one per file. A task converts inputs to rows of tokens and converts the model's outputs to results."""
