"""The training loop: batches, checkpoints, log, validation, and the bundle at the end."""
