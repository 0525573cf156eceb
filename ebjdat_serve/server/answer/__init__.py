"""From a worker's result to a response."""
