"""From bytes of a connection to a validated request."""
