"""Requests that wait for a worker."""
