"""The parts of training/evaluate.py: what is measured, how it is attacked, what becomes of it."""
