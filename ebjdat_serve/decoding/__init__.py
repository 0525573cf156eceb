"""Decoding with a budget: the header is judged first, pixels are made in processes with limits of memory and time."""
