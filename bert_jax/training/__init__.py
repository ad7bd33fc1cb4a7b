"""Training: optimizers, losses, the loop, its checkpoints and processes."""
