"""A check in progress in a generate worker: are the labels of some images within reach of a small change?"""

from typing import Any

import numpy as np

from ebjdat_serve import reach
from ebjdat_serve.engines import Engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.reach import Checks
from ebjdat_serve.scheduling import Group, Rows
from ebjdat_serve.server.compute.model import Model, Operation
from ebjdat_serve.server.payloads import Checked, CheckJob


class CheckGroup(Group[Checks]):
    """The walks and searches of one job; those of several jobs share their gradients' batches."""

    cost = reach.CHECK_COST

    @staticmethod
    def advance(engine: Engine, batch: Checks, steps: int) -> Checks:
        """Return ``batch`` after ``steps`` steps of each walk and search."""
        return reach.advance(engine, batch, steps)


class CheckTask:
    """A CheckJob in progress."""

    def __init__(self, model: Model, job: CheckJob) -> None:
        check = model.calibrated.check if model.calibrated else None
        if check is None:
            raise EbjdatError("the bundle has no calibration of the walk that a check takes")
        self._check, self._job, self._left = check, job, job.n
        self._predictions = model.predict(job.image)
        start = Checks.start(to_unit(job.image), -self._predictions.joint_energy, radius=job.radius, steps=job.steps)
        self.group, self.preview_taken = CheckGroup(model.engine, start, job.steps), True

    @property
    def done(self) -> bool:
        """Whether every walk and search is over."""
        return not self._left

    def finish(self, rows: Rows) -> None:
        """Note that ``rows`` are over."""
        self._left -= len(rows)

    def result(self) -> Checked:
        """Return the predictions, and what walks and searches found."""
        predictions, found = self._predictions, self.group.chains
        scores = {"ood": predictions.suspicion, "margin": -predictions.margin, "reach": found.reach}
        p_values, reasons = self._check.look(scores)
        return Checked(predictions, found.reach, p_values["reach"], found.stable, np.asarray(reasons))

    def preview(self) -> Any:
        """Return None: a check is short."""


CHECK = Operation("check", "generate", CheckTask)
