"""`ebjdat-serve serve --stock`: the same models by LitServe's public hooks alone.

Its routes, queues and loops, for the day that a LitServe to come moves what `seam` relies on, and to measure what `seam` is worth.
POST /classify takes {"image": base64} and answers what /classify and /energy answer; POST /generate takes {"class", "n", "steps",
"seed"}, one request at a time. Deadlines, cancellation, back-pressure, streams, refresh and other bodies are not to be had this way.
"""

import base64
import contextlib
import os
import signal
from typing import Any

import litserve as ls
import numpy as np
from fastapi import HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from ebjdat_serve import pixels
from ebjdat_serve.errors import EngineError, InvalidImage
from ebjdat_serve.generation import generate
from ebjdat_serve.locking import hold
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.selftest import verify
from ebjdat_serve.server import api_docs
from ebjdat_serve.server.answer.problems import Problem
from ebjdat_serve.server.answer.responses import Order, Words
from ebjdat_serve.server.compute.workers import Model
from ebjdat_serve.server.ipc import Drawn, Verdicts
from ebjdat_serve.server.model_manager import Served, open_bundle
from ebjdat_serve.server.read.generate_request import make_order
from ebjdat_serve.server.settings import Settings

BATCH_SECONDS = 0.002
"""How long LitServe waits for company; with 0 it spins on an idle core."""


class Stock(ls.LitAPI):
    """What both have in common: the model, and the words for its answers."""

    functions: tuple[str, ...] = ("classify",)

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings

    def setup(self, device: str) -> None:
        """Open the model."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.served: Served = open_bundle(self._settings.model, self._settings)
        self.held = hold(self.served.bundle.path)
        self.model = Model(self.served.bundle.path, self._settings)
        verify(self.model.bundle, self.model.engine, self.functions)
        self.words = Words(self.served, self._settings.alpha)


class StockClassify(Stock):
    """One image a request, batched by LitServe."""

    def decode_request(self, request: Request) -> Pixels | str:  # what LitServe gives for this annotation is a dict
        """Return the pixels, or what is wrong with them: an exception would fail everyone in the batch."""
        size = self.served.bundle.manifest.input
        document: Any = request
        try:
            return pixels.decode(base64.b64decode(document["image"], validate=True), size.height, size.width)
        except (InvalidImage, ValueError, KeyError, TypeError) as error:
            return f'send {{"image": "<base64>"}}: {error}'

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave the requests as they are."""
        return inputs

    def predict(self, x: Any) -> Any:
        """Return what the model says of each."""
        if not isinstance(x, list):  # with max_batch 1 LitServe gives one, and wants one back
            return self.predict([x])[0]
        good = [i for i, one in enumerate(x) if not isinstance(one, str)]
        answers: list[Any] = list(x)
        if good:
            said = self.model.verdicts(np.stack([x[i] for i in good]))
            for row, i in enumerate(good):
                answers[i] = said.rows(slice(row, row + 1))
        return answers

    def unbatch(self, output: list[Verdicts | str]) -> list[Verdicts | str]:
        """Return one a request."""
        return output

    def encode_response(self, output: Verdicts | str) -> Any:
        """Return the answer."""
        if isinstance(output, str):
            return JSONResponse({"detail": output}, 422)  # an exception would fail everyone in the batch
        said = {**self.words.classified(output)[0], **self.words.energies(output)[0]}
        return {**said, "alpha": self.words.alpha, "model": self.served.name}


class StockGenerate(Stock):
    """One request after the other."""

    functions = ("classify", "step")

    def decode_request(self, request: Request) -> Order:
        """Return what is asked for."""
        document: Any = request
        if not isinstance(document, dict):
            raise HTTPException(422, 'send a JSON object such as {"class": 3, "n": 4}')
        try:
            order = make_order({**document, "format": "json"}, self.words, self._settings)
        except (Problem, RequestValidationError) as error:
            raise HTTPException(422, str(error)) from error
        if order.query.stream:
            raise HTTPException(422, "the stock mode has no streams: serve without --stock")
        return order

    def predict(self, x: Order) -> dict[str, Any]:
        """Draw."""
        job = x.job
        samples = generate(self.model.engine, self.model.prior, job.sampler, np.full(job.n, job.label, np.int64), job.seed)
        return x.document(Drawn(samples.image, self.model.verdicts(samples.image)))

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer."""
        return output


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; raise EngineError when a worker cannot start."""
    classify = StockClassify(settings, max_batch_size=settings.max_batch, batch_timeout=BATCH_SECONDS, api_path="/classify")
    apis: list[ls.LitAPI] = [classify]
    if settings.generate_workers:
        apis.append(StockGenerate(settings, api_path="/generate"))
    served = open_bundle(settings.model, settings)
    server = ls.LitServer(apis, accelerator="cpu", devices=1, timeout=settings.generate_deadline, model_metadata={"model": served.name})
    api_docs.install(server.app)

    owner = os.getpid()

    def stop(*_: object) -> None:
        raise KeyboardInterrupt if os.getpid() == owner else SystemExit(0)  # the latter in the forked HTTP process

    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            server.run(
                host=settings.host, port=settings.port, num_api_servers=1, log_level="warning", generate_client_file=False, access_log=False
            )
        except RuntimeError as error:
            raise EngineError(f"LitServe could not start: {error}") from error
