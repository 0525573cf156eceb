"""A verified bundle, as the HTTP process needs it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle, Calibration, resolve
from ebjdat_serve.detection import Detector
from ebjdat_serve.errors import BundleError
from ebjdat_serve.rows import to_json
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.store import reason_held_back


@dataclass(frozen=True)
class ServedModel:
    """A verified bundle; ``key`` is the sha256 of what decides its answers, ``Bundle.served``."""

    key: str
    bundle: Bundle
    calibration: Calibration
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """NAME@VERSION, as answers name the model that made them."""
        return f"{self.bundle.manifest.name}@{self.bundle.manifest.version}"

    @property
    def labels(self) -> list[str]:
        """Labels by class index."""
        return self.bundle.manifest.labels


def open_bundle(path: Path, settings: Settings) -> ServedModel:
    """Return the bundle at ``path``, or the current one of a store there, after every check that needs no engine.

    Raises BundleError, and EbjdatError for an alpha that its calibration cannot serve.
    """
    folder = resolve(path)
    signed = ""
    if settings.trust:
        from ebjdat_serve.signing import check_signature  # cryptography costs 100 ms and memory

        signed = check_signature(folder, settings.trust)
    if reason := reason_held_back(folder):
        raise BundleError(f"{folder} is a candidate and is not served: {reason}; ebjdat-serve publish {folder} STORE --force publishes it")
    bundle = Bundle.load(folder)
    if signed and bundle.key != signed:
        raise BundleError(f"{folder} was changed while it was read; publish the change as a new version")
    bundle.check_precision(settings.precision)
    calibration = bundle.calibration(settings.precision)
    Detector(np.asarray(calibration.scores), settings.alpha)
    return ServedModel(bundle.served, bundle, calibration, [to_json(row) for row in bundle.metrics()])


def fingerprint(folder: Path) -> tuple[Any, ...]:
    """Return a value that changes when the bundle in a folder, or its signature, is replaced."""
    times = [file.stat().st_mtime_ns if file.exists() else 0 for file in (folder / MANIFEST, folder / SIGNATURE)]
    return (folder, *times)
