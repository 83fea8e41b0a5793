"""One stage: the training step, the loop, checkpoints and logs."""
