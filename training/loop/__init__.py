"""The training loop and what surrounds a step: batches, checkpoints, log, validation, and the bundle at the end."""
