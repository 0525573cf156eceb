"""The endpoints: a new one is a handler and an operation, in a module of this package, and a line here."""

from ebjdat_serve.server.endpoints import generate, predict, status

ENDPOINTS = [
    predict.CLASSIFY,
    predict.ENERGY,
    generate.GENERATE_GET,
    generate.GENERATE_HEAD,
    generate.GENERATE_POST,
    status.HEALTH,
    status.INFO,
    status.INDEX,
]
