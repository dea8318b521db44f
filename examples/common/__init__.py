"""What the examples share: text, model, optimizers, the training loop, checkpoints, pictures."""
