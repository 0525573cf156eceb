"""Jobs in progress in a generate worker: what the scheduler moves, and the one that draws images."""

from typing import Any, Protocol

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.scheduling import ChainGroup, Group, Rows
from ebjdat_serve.server.compute.model import Model, Operation
from ebjdat_serve.server.payloads import GeneratedImages, GenerateJob, GeneratePreview, Predictions, concatenate
from ebjdat_serve.sgld import Chains


class ChainTask(Protocol):
    """A job in progress in a generate worker."""

    @property
    def group(self) -> Group[Any]:
        """What the scheduler moves."""

    preview_taken: bool  # whether the client has received the last preview

    @property
    def done(self) -> bool:
        """Whether ``result`` is complete."""

    def finish(self, rows: Rows) -> None:
        """Take the chains ``rows``, which have taken their last step."""

    def result(self) -> Any:
        """Return the value of the response."""

    def preview(self) -> Any:
        """Return the value of the next preview, None if there is none to send yet."""


class GenerateTask:
    """A GenerateJob in progress: its chains, and the images of those that are finished."""

    def __init__(self, model: Model, job: GenerateJob) -> None:
        self._model, self._job = model, job
        chains = Chains.start(model.prior, job.sampler, np.full(job.n, job.label, np.int64), job.seed)
        self.group = ChainGroup(model.engine, chains, job.sampler.steps)
        self.preview_taken = True
        self._image = np.zeros((job.n, *chains.image.shape[2:], 3), np.uint8)
        self._predictions: dict[int, Predictions] = {}
        self._previewed = 0  # step of the last preview

    def finish(self, rows: Rows) -> None:
        """Turn finished chains into pixels, and predict exactly those."""
        if len(rows):
            self._image[rows] = pixels.to_bytes(self.group.chains.image[rows])
            predictions = self._model.predict(self._image[rows])
            self._predictions |= {int(row): predictions[i : i + 1] for i, row in enumerate(rows)}

    @property
    def done(self) -> bool:
        """Whether every chain is finished."""
        return len(self._predictions) == self._job.n

    def result(self) -> GeneratedImages:
        """Return the images and the predictions for them."""
        return GeneratedImages(self._image, concatenate([self._predictions[row] for row in range(self._job.n)]))

    def preview(self) -> GeneratePreview | None:
        """Return how the chains look now, once the slowest is ``every`` steps further and the client has received the last preview."""
        step = int(self.group.chains.step.min())
        if not self._job.every or not self.preview_taken or step - self._previewed < self._job.every:
            return None
        self._previewed, self.preview_taken = step, False
        image = pixels.to_bytes(self.group.chains.image)
        return GeneratePreview(step, image, self._model.predict(image))


GENERATE = Operation("generate", "generate", GenerateTask)
