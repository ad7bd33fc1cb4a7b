"""Training: optimizers, learning-rate schedules, LoRA, the training loop, and its checkpoints and logs."""
