"""Training: optimizers, losses, the training loop, its checkpoints and its processes."""
