"""The evaluation: measurements, attacks, result cache, rows and reports of training/evaluate.py."""
