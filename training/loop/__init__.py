"""The training loop: stages, state, log and what becomes of the weights."""
