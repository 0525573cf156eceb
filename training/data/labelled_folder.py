"""A folder of labelled images to measure an imported model on: by the labels and the input contract of its bundle.

Its training images are not known, so that there is no train split; the model chose none of these.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ebjdat_serve.folder_images import labels_of
from ebjdat_serve.listing import list_images, printable
from ebjdat_serve.manifest import Manifest
from training.data.datasets import LEAST_CALIBRATION, SMALLEST, Dataset
from training.data.image_folders import SPLIT_SEED, Split, note, read_images, tell
from training.errors import DataError

FOLDER_BYTES = 2**31
"""Bytes of pixels that are read of a folder, at most: 14,000 images of 224 x 224."""
HELD = 2500
"""Images of the selection split, and of the calibration split, at most."""


def labelled_folder(folder: Path, manifest: Manifest, folders: Mapping[str, str] | None = None) -> Dataset:
    """Return the images of ``folder`` that have a label, in a fixed shuffled order, as a data set without images to train on.

    Labels are sub-folders' names, a label or a class's number, or ``folders`` tells them. A tenth is the selection split, a quarter the
    calibration split, the rest the test split. Raises DataError for a folder of fewer than SMALLEST such images.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} is not a folder")
    listing = list_images(folder)
    tell(folder, listing)
    label, how = labels_of(listing.images, folder, manifest.labels, folders or {})
    known = np.empty(0, np.int64) if label is None else np.flatnonzero(label >= 0)
    if label is None or len(known) < SMALLEST:
        raise DataError(f"{printable(folder)}: {len(known)} images {how}; {SMALLEST} that have one are the least to measure on")
    chosen = np.random.default_rng(SPLIT_SEED).permutation(known)
    most = FOLDER_BYTES // (3 * manifest.input.height * manifest.input.width)
    if len(chosen) > most:
        note(printable(folder), f"{most:,} of {len(chosen):,} images are read, drawn at random: all would take more memory")
    chosen = chosen[:most]
    image = read_images([listing.images[place] for place in chosen], manifest.input)
    return dataset_of_images(printable(folder.resolve().name), Split(image, label[chosen]), manifest)


def dataset_of_images(name: str, every: Split, manifest: Manifest) -> Dataset:
    """Return the data set of images in random order."""
    n = len(every)
    selection, calibration = min(HELD, max(8, n // 10)), min(HELD, max(LEAST_CALIBRATION, n // 4))
    digest = hashlib.sha256(b"labelled folder")
    digest.update(every.sha256().encode())
    return Dataset(
        name=name,
        names=tuple(manifest.labels),
        train=every.take(slice(0, 0)),
        selection=every.take(slice(0, selection)),
        calibration=every.take(slice(selection, selection + calibration)),
        test=every.take(slice(selection + calibration, n)),
        flip=True,
        sha256=digest.hexdigest(),
        contract=manifest.input,
    )
