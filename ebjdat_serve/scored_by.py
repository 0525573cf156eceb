"""What decides an image's scores: two servers of which it is the same give the same scores, so that their records can be compared."""

import hashlib
import json
from dataclasses import asdict

import numpy as np

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import BundleError
from ebjdat_serve.manifest import OF_IMAGES, RecordedCalibration
from ebjdat_serve.views import Combination


def scored_by(bundle: Bundle, precision: str, combination: Combination) -> str:
    """Return the sha256 of graph, weights, input contract and fitted views in ``precision``: not of thresholds, versions and evidence."""
    weights = bundle.manifest.files["weights.safetensors"].sha256
    found = hashlib.sha256(json.dumps([precision, bundle.measured(precision), weights, asdict(bundle.manifest.input)]).encode())
    for name, stored in combination.stored.items():
        for key, array in sorted({**stored, "clean ranks": combination.clean[name]}.items()):
            found.update(json.dumps([name, key, array.dtype.str, array.shape]).encode())
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def chosen(bundle: Bundle, name: str, precision: str, by: str) -> RecordedCalibration | None:
    """Return the calibration ``name`` by recorded scores, None for the one on images; ``by`` is what ``scored_by`` says of the bundle.

    Raises BundleError for a name that is not there, and for one that was recorded in another precision or with other views.
    """
    if name == OF_IMAGES:
        return None
    there = bundle.recorded()
    if name not in there:
        raise BundleError(f"{bundle.path} has no calibration {name[:40]!r}; there are: {', '.join([OF_IMAGES, *there])}")
    found = there[name]
    if found.precision != precision:
        raise BundleError(f"{bundle.path}: the calibration {name} was recorded in {found.precision} and does not hold for {precision}")
    if found.scored_by != by:
        raise BundleError(
            f"{bundle.path}: the calibration {name} is stale, it was recorded with another graph or other views; "
            "ebjdat-serve calibrate BUNDLE --scores FILE makes one of scores that this version recorded"
        )
    return found
