"""From a worker's output to a response."""
