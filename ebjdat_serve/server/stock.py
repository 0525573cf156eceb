"""`ebjdat-serve serve --stock`: the same models by LitServe's public hooks alone.

LitServe's own routes, queues and loops, in case a later LitServe changes what litserve_adapter relies on, and to measure what that module
is worth. POST /classify takes {"image": base64} and answers what /classify and /energy answer; POST /generate takes {"class", "n",
"steps", "seed"}, one request at a time. There are no deadlines, cancellation, back-pressure, streams, refresh or other kinds of body.
"""

import base64
import contextlib
import logging
import os
import signal
from typing import Any

import litserve as ls
import numpy as np
from fastapi import HTTPException, Request
from fastapi.responses import JSONResponse

from ebjdat_serve import pixels
from ebjdat_serve.errors import EbjdatError, EngineError, InvalidImage, cause
from ebjdat_serve.generation import generate
from ebjdat_serve.keys import KEY_VARIABLE
from ebjdat_serve.locking import hold
from ebjdat_serve.pixels import Pixels
from ebjdat_serve.server import api_docs
from ebjdat_serve.server.answer.images import GenerateAnswers
from ebjdat_serve.server.answer.predictions import ClassifyAnswer, EnergyAnswer, classify_answer, energy_answer
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.payloads import GeneratedImages, Predictions
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.generate_request import GenerateRequest, validate
from ebjdat_serve.server.read.images import limits
from ebjdat_serve.server.served_model import ServedModel, open_first
from ebjdat_serve.server.settings import Settings

BATCH_SECONDS = 0.002
"""Seconds that LitServe waits to fill a batch; with 0 it keeps an idle core busy."""


class StockAnswer(EnergyAnswer, ClassifyAnswer):
    """Answer of /classify: the fields of both."""


class Stock(ls.LitAPI):
    """What both APIs share: the model."""

    functions: tuple[str, ...] = ("classify",)

    def __init__(self, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings

    def setup(self, device: str) -> None:
        """Open the model."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.served: ServedModel = open_first(self._settings)[0]
        self.held = hold(self.served.bundle.path)
        self.model = Model(self.served.bundle.path, self._settings, self.functions, self.served.key)


class StockClassify(Stock):
    """One image a request, batched by LitServe."""

    def decode_request(self, request: Request) -> Pixels | str:  # what LitServe gives for this annotation is a dict
        """Return the pixels, or what is wrong with them: an exception would fail everyone in the batch."""
        document: Any = request
        try:
            data = base64.b64decode(document["image"], validate=True)
            return pixels.decode(data, self.served.bundle.manifest.input, limits(self._settings))
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
            predictions = self.model.predict(np.stack([x[i] for i in good]))
            for row, i in enumerate(good):
                answers[i] = predictions[row : row + 1]
        return answers

    def unbatch(self, output: list[Predictions | str]) -> list[Predictions | str]:
        """Return one a request."""
        return output

    def encode_response(self, output: Predictions | str) -> Any:
        """Return the answer."""
        if isinstance(output, str):
            return JSONResponse({"detail": output}, 422)  # an exception would fail everyone in the batch
        answers = (classify_answer, *(() if self.served.lacks("energy") else (energy_answer,)))
        parts = [answer(output, False, self.served, self._settings.alpha) for answer in answers]
        said = {name: getattr(part, name) for part in parts for name in part.model_fields_set}
        return StockAnswer(**said).model_dump(exclude_unset=True)


class StockGenerate(Stock):
    """One request after the other."""

    functions = ("classify", "step")

    def decode_request(self, request: Request) -> GenerateRequest:
        """Return the validated request."""
        document: Any = request
        if not isinstance(document, dict):
            raise HTTPException(422, 'send a JSON object such as {"class": 3, "n": 4}')
        try:
            wanted = validate({**document, "format": "json"}, self.served.bundle.manifest, self._settings)
        except Problem as problem:
            raise HTTPException(422, problem.detail) from problem
        if wanted.query.stream:
            raise HTTPException(422, "the stock mode has no streams: serve without --stock")
        return wanted

    def predict(self, x: GenerateRequest) -> dict[str, Any]:
        """Draw the images."""
        job = x.job
        samples = generate(self.model.engine, self.model.prior, job.sampler, np.full(job.n, job.label, np.int64), job.seed)
        answers = GenerateAnswers(self.served, job, x.query.temperature, x.query.scale, self._settings.alpha)
        return answers.document(GeneratedImages(samples.image, self.model.predict(samples.image))).model_dump(exclude_unset=True)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the answer."""
        return output


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM; raise EngineError when a worker cannot start, EbjdatError for keys, which this mode does not check."""
    if settings.keys or os.environ.get(KEY_VARIABLE) is not None:
        raise EbjdatError(f"serve --stock checks no keys: leave it out, or --keys and {KEY_VARIABLE}")
    classify = StockClassify(settings, max_batch_size=settings.max_batch, batch_timeout=BATCH_SECONDS, api_path="/classify")
    apis: list[ls.LitAPI] = [classify]
    served, refused = open_first(settings)
    if settings.generate_workers and not served.lacks("generate"):
        apis.append(StockGenerate(settings, api_path="/generate"))
    if refused:
        logging.getLogger("ebjdat_serve").error("%s goes on: %s", served.name, refused)
    server = ls.LitServer(apis, accelerator="cpu", devices=1, timeout=settings.generate_deadline, model_metadata={"model": served.name})
    api_docs.install(server.app, settings)

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
            raise EngineError(f"LitServe could not start: {cause(error)}") from error
