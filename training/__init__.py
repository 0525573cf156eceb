"""Training and evaluation: run from the checkout, not part of the wheel."""
