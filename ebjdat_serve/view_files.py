"""views.safetensors: what the views of each precision were fitted to, and the clean scores that a policy looks at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ebjdat_serve.errors import BundleError
from ebjdat_serve.views import VIEWS, Combination, Floats, View

CLEAN, REVIEWED, REACH = "clean", "reviewed", "reach"
"""Names of a view's sorted clean scores among its arrays; in place of a view's name, of what the policy looks at; there, of the walk."""


def save_views(file: Path, fitted: Mapping[str, Combination], reviewed: Mapping[str, Mapping[str, Floats]]) -> None:
    """Write the views of each precision, tensors PRECISION.VIEW.ARRAY, and the scores of the same clean images that a policy looks at."""
    tensors = {f"{precision}.{REVIEWED}.{name}": scores for precision, each in reviewed.items() for name, scores in each.items()}
    tensors |= {
        f"{precision}.{name}.{key}": np.array(array, order="C")
        for precision, combination in fitted.items()
        for name, stored in combination.stored.items()
        for key, array in {**stored, CLEAN: combination.clean[name]}.items()
    }
    save_file(tensors, file)


def load_reviewed(file: Path, precision: str, names: Sequence[str]) -> dict[str, Floats]:
    """Return the named scores (n,) of the same clean images, high = suspicious.

    Raises BundleError for scores that are not there, are no finite fp32 numbers, or are not of as many images.
    """
    tensors = read_tensors(file)
    try:
        found = {name: tensors[f"{precision}.{REVIEWED}.{name}"] for name in names}
    except KeyError as error:
        raise BundleError(f"{file} has no {error.args[0]}: calibrate again") from error
    for name, scores in found.items():
        if scores.dtype != np.float32 or scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all():
            raise BundleError(f"{file}: {precision}.{REVIEWED}.{name} must be finite scores of clean images, fp32: calibrate again")
    if len({len(scores) for scores in found.values()}) > 1:
        raise BundleError(f"{file}: {precision}.{REVIEWED} has scores of different numbers of images: calibrate again")
    return found


def read_tensors(file: Path) -> dict[str, NDArray[Any]]:
    """Return all tensors of a file; raise BundleError when it cannot be read."""
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file} cannot be read: {error}") from error


def load_views(file: Path, precision: str, names: Sequence[str], views: Mapping[str, View] | None = None) -> Combination:
    """Return the named views of ``precision``; raise BundleError for a view that is unknown, or not stored whole."""
    known = VIEWS if views is None else views
    tensors = read_tensors(file)
    if unknown := [name for name in names if name not in known]:
        raise BundleError(f"{file}: view {unknown[0][:40]!r} is unknown; this version knows {', '.join(known)}: calibrate again")
    if not names or len(set(names)) < len(names):
        raise BundleError(f"{file}: the OOD score must be of one view or more, each once")
    stored = {name: {key.rpartition(".")[2]: tensors[key] for key in tensors if key.startswith(f"{precision}.{name}.")} for name in names}
    for key, array in ((f"{name}.{key}", array) for name, arrays in stored.items() for key, array in arrays.items()):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise BundleError(f"{file}: {precision}.{key} must be finite floating-point numbers: calibrate again")
    clean = {name: arrays.pop(CLEAN, np.empty(0, np.float32)) for name, arrays in stored.items()}
    for name, values in clean.items():
        if values.dtype != np.float32 or values.ndim != 1 or not len(values) or not (np.diff(values) >= 0).all():
            raise BundleError(f"{file}: {precision}.{name}.{CLEAN} must be sorted scores of clean images, fp32: calibrate again")
    return Combination(stored, clean, {name: known[name] for name in names})
