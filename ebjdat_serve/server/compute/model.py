"""A bundle as a worker runs it, and the operations that requests ask for by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Outputs
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.reach import margin
from ebjdat_serve.server import ipc
from ebjdat_serve.server.payloads import TOP, Predictions
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Prior
from ebjdat_serve.verification import verified
from ebjdat_serve.views import Seen


class Model:
    """An engine, and the calibration that turns its outputs into predictions."""

    def __init__(self, folder: Path, settings: Settings, functions: Sequence[str] = ("classify",), key: str = "") -> None:
        found = verified(folder, settings.terms(), functions, key=key)  # its signature was checked when ``key`` was read
        assert found.opened
        self.bundle, self.calibration = found.bundle, found.calibration
        self.combination, self.detector, self.review, self.check = found.combination, found.detector, found.review, found.check
        self.engine, self._prior = found.opened.engine, found.opened.prior

    @property
    def prior(self) -> Prior:
        """Return where chains start; a model that was opened to step has it."""
        assert self._prior
        return self._prior

    def engine_info(self) -> dict[str, str]:
        """Return engine, provider and precision."""
        return {"engine": self.engine.name, "provider": self.engine.provider, "precision": self.engine.precision}

    def forward(self, image: pixels.Pixels) -> Outputs:
        """Return logits, energy and features of pixels (n, H, W, 3)."""
        return classify_in_chunks(self.engine, pixels.to_unit(image))

    def predict(self, image: pixels.Pixels) -> Predictions:
        """Return the predictions for pixels (n, H, W, 3)."""
        unit = pixels.to_unit(image)
        logits, energy, features = classify_in_chunks(self.engine, unit)
        terms = self.combination.terms(Seen(unit, features, logits))
        scores = self.combination.score(terms)
        p_value = self.detector.p_value(scores)
        probability = probabilities(logits, self.calibration.temperature)
        top, margins = np.argsort(-probability, axis=1, kind="stable")[:, :TOP], margin(logits)
        p_values, reasons = self.review.look({"ood": scores, "margin": -margins})
        margin_p_value = p_values.get("margin", np.full(len(margins), np.nan))
        suspicious, why = self.detector.suspicious(p_value), terms.argmax(axis=1)
        return Predictions(probability, -logits, energy, scores, p_value, suspicious, top, why, margins, margin_p_value, reasons)


@dataclass(frozen=True)
class Operation:
    """``run(model, payload)`` in a worker of ``kind``, under ``name`` in messages; ``run`` must be importable by its qualified name.

    In a classify worker the payload is a batch of pixels (n, H, W, 3), and ``run`` returns an array with n rows or an object indexed like
    one. In a generate worker ``run`` returns a ChainTask, whose chains are scheduled with those of all others.
    """

    name: str
    kind: ipc.Kind
    run: Callable[[Model, Any], Any]


PREDICT = Operation("predict", "classify", Model.predict)
