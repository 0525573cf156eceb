"""The HTTP server: our own routes on LitServe's app, queues and worker processes."""
