"""A bundle as a worker runs it, and the operations that requests ask for by name."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve import pixels
from ebjdat_serve.detection import probabilities
from ebjdat_serve.engines import Floats, Outputs, on_cpu
from ebjdat_serve.generation import chunk_size, classify_in_chunks
from ebjdat_serve.reach import margin
from ebjdat_serve.scores import ood_score, uncalibrated
from ebjdat_serve.server import ipc
from ebjdat_serve.server.payloads import TOP, Predictions, concatenate
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Prior
from ebjdat_serve.verification import verified
from ebjdat_serve.views import Seen


class Model:
    """An engine, and the calibration that turns its outputs into predictions."""

    def __init__(self, folder: Path, settings: Settings, functions: Sequence[str] = ("classify",), key: str = "") -> None:
        found = verified(folder, settings.terms(), functions, key=key)  # its signature was checked when ``key`` was read
        assert found.opened
        self.bundle, self.calibrated = found.bundle, found.calibrated
        self.engine, self._prior = found.opened.engine, found.opened.prior
        threads = settings.terms().threads_for(self.bundle.manifest.input)
        self._threads = ThreadPoolExecutor(threads, "predict") if on_cpu(self.engine) and threads > 1 else None

    @property
    def prior(self) -> Prior:
        """Return where chains start; only of a model that generates."""
        self._prior = self._prior or Prior.load(self.bundle.path / "prior.safetensors")
        return self._prior

    @property
    def temperature(self) -> float:
        """Return the temperature of p(y|x), 1 without a calibration."""
        return self.calibrated.calibration.temperature if self.calibrated else 1.0

    def engine_info(self) -> dict[str, str]:
        """Return engine, provider and precision."""
        return {"engine": self.engine.name, "provider": self.engine.provider, "precision": self.engine.precision}

    def forward(self, image: pixels.Pixels) -> Outputs:
        """Return logits, energy and features of pixels (n, H, W, 3)."""
        return classify_in_chunks(self.engine, pixels.to_unit(image))

    def predict(self, image: pixels.Pixels) -> Predictions:
        """Return the predictions for pixels (n, H, W, 3); on a CPU large images are predicted side by side, each in one thread or more."""
        size = chunk_size(self.engine, *image.shape[1:3])
        if len(image) <= size:
            return self._predict(image)
        parts = [image[start : start + size] for start in range(0, len(image), size)]
        return concatenate(list(self._threads.map(self._predict, parts) if self._threads else map(self._predict, parts)))

    def _predict(self, image: pixels.Pixels) -> Predictions:
        unit = pixels.to_unit(image)
        with np.errstate(invalid="ignore", over="ignore"):  # answers that are not finite are refused where they are given
            return self._predicted(unit, *self.engine.classify(unit))

    def _predicted(self, unit: Floats, logits: Floats, energy: Floats | None, features: Floats | None) -> Predictions:
        probability, nothing = probabilities(logits, self.temperature), np.full(len(logits), np.nan)
        top, margins = np.argsort(-probability, axis=1, kind="stable")[:, :TOP], margin(logits)
        energies = nothing.astype(np.float32) if energy is None else energy
        if self.calibrated is None:
            none = np.zeros(len(logits), np.int64)
            scores = ood_score(uncalibrated(energy=energy is not None), 0.0, logits)
            return Predictions(
                probability, -logits, energies, scores, nothing, none > 0, top, none, margins, nothing, np.empty((len(logits), 0), np.bool_)
            )
        c = self.calibrated
        terms = c.combination.terms(Seen(unit, features, logits))
        scores = c.combination.score(terms)
        p_value = c.detector.p_value(scores)
        p_values, reasons = c.review.look({"ood": scores, "margin": -margins})
        suspicious, why, margin_p_value = c.detector.suspicious(p_value), terms.argmax(axis=1), p_values.get("margin", nothing)
        return Predictions(probability, -logits, energies, scores, p_value, suspicious, top, why, margins, margin_p_value, reasons)


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
