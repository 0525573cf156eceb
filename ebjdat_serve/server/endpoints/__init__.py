"""The endpoints: a new one is a handler and an operation, in a module of this package, and a line here."""

from ebjdat_serve.server.endpoints.explain import EXPLAIN_POST
from ebjdat_serve.server.endpoints.generate import GENERATE_GET, GENERATE_HEAD, GENERATE_POST
from ebjdat_serve.server.endpoints.metrics import METRICS
from ebjdat_serve.server.endpoints.predict import CLASSIFY, ENERGY
from ebjdat_serve.server.endpoints.status import HEALTH, INDEX, INFO, MODELS
from ebjdat_serve.server.endpoints.v2 import V2

ENDPOINTS = [
    CLASSIFY,
    ENERGY,
    EXPLAIN_POST,
    GENERATE_GET,
    GENERATE_HEAD,
    GENERATE_POST,
    HEALTH,
    MODELS,
    INFO,
    METRICS,
    INDEX,
    *V2,
]
