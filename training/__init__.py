"""The laboratory: run from the checkout, never in the wheel."""
