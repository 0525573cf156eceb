"""An explanation in progress in a generate worker."""

import numpy as np

from ebjdat_serve import counterfactual, pixels
from ebjdat_serve.counterfactual import LONGEST, Searches
from ebjdat_serve.engines import Engine
from ebjdat_serve.scheduling import Group, Rows
from ebjdat_serve.server.compute.model import Model, Operation
from ebjdat_serve.server.payloads import ExplainJob, Explanation


class SearchGroup(Group[Searches]):
    """The search of one job; searches of several jobs share their gradients' batches."""

    cost = counterfactual.STEP_COST

    @staticmethod
    def advance(engine: Engine, batch: Searches, steps: int) -> Searches:
        """Return ``batch`` after ``steps`` steps of each search."""
        return counterfactual.advance(engine, batch, steps)


class ExplainTask:
    """An ExplainJob in progress."""

    def __init__(self, model: Model, job: ExplainJob) -> None:
        self._model, self._job = model, job
        logits = model.forward(job.image).logits
        source = logits.argmax(axis=1)
        target = counterfactual.rivals(logits, source) if job.target is None else np.full(1, job.target, np.int64)
        search = Searches.start(
            pixels.to_unit(job.image), logits, target,
            norm=job.norm, radius=job.radius, least=job.least, temperature=model.temperature,
        )  # fmt: skip
        self.group = SearchGroup(model.engine, search, LONGEST)
        self.preview_taken, self._previewed, self.done = True, 0, False

    def finish(self, rows: Rows) -> None:
        """Note that the search is over."""
        self.done = self.done or len(rows) > 0

    def result(self) -> Explanation:
        """Return the nearest image of the target; the last, which is not valid, where none was found."""
        search, job = self.group.chains, self._job
        image = np.concatenate([job.image, pixels.to_bytes(search.best)])
        predictions, target = self._model.predict(image), int(search.target[0])
        valid = bool(search.found[0]) and int(predictions.top[1, 0]) == target
        return Explanation(int(search.step[0]), target, valid, image, predictions, search.path[0])

    def preview(self) -> Explanation | None:
        """Return the search so far, once it is ``every`` steps further and the client has received the last preview."""
        step, job = int(self.group.chains.step[0]), self._job
        if not job.every or not self.preview_taken or step - self._previewed < job.every:
            return None
        self._previewed, self.preview_taken = step, False
        return self.result()


EXPLAIN = Operation("explain", "generate", ExplainTask)
