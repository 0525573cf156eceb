"""A bundle as a worker runs it, and the operations that requests ask for by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.scores import ood_score
from ebjdat_serve.server import ipc
from ebjdat_serve.server.payloads import TOP, Predictions
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.verification import verified


class Model:
    """An engine, and the calibration that turns its outputs into predictions."""

    def __init__(self, folder: Path, settings: Settings, functions: Sequence[str] = ("classify",), key: str = "") -> None:
        found = verified(folder, settings.terms(), functions, key=key)  # its signature was checked when ``key`` was read
        assert found.opened
        self.bundle, self.calibration, self.detector = found.bundle, found.calibration, found.detector
        self.engine, self.prior = found.opened.engine, found.opened.prior

    def engine_info(self) -> dict[str, str]:
        """Return engine, provider and precision."""
        return {"engine": self.engine.name, "provider": self.engine.provider, "precision": self.engine.precision}

    def forward(self, image: pixels.Pixels) -> tuple[Floats, Floats]:
        """Return logits (n, K) and energy (n,) of pixels (n, H, W, 3)."""
        parts = classify_in_chunks(self.engine, pixels.to_unit(image))
        logits, energy = (np.concatenate(part) for part in zip(*parts, strict=True))
        return logits, energy

    def predict(self, image: pixels.Pixels) -> Predictions:
        """Return the predictions for pixels (n, H, W, 3)."""
        logits, energy = self.forward(image)
        scores = ood_score(self.calibration.score, self.calibration.weight, logits)
        p_value = self.detector.p_value(scores)
        probability = probabilities(logits, self.calibration.temperature)
        top = np.argsort(-probability, axis=1, kind="stable")[:, :TOP]
        return Predictions(probability, -logits, energy, scores, p_value, self.detector.suspicious(p_value), top)


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
