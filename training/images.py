"""A data set split once and for all: CIFAR-10, CIFAR-100, SVHN, digits, or a folder of class sub-folders.

Data is found under ``EBJDAT_DATA`` (default ``~/.cache/ebjdat_serve/data``).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training import sources
from training.errors import DataError
from training.pictures import SPLIT_SEED, Labels, Pixels, Split, class_names, data_root, load_images, read_atlas, read_folder, read_npz

NAMED = ("cifar10", "cifar100", "svhn", "digits")
SMALLEST = 200  # images to train and hold out from: fewer leave no calibration worth the name


@dataclass(frozen=True)
class Dataset:
    """Four disjoint splits: train, selection (choices and tuning), calibration (p-values only) and test."""

    name: str
    names: tuple[str, ...]
    train: Split
    selection: Split
    calibration: Split
    test: Split
    flip: bool  # whether a mirror image is of the same class
    sha256: str


def load(name: str, size: tuple[int, int] | None = None) -> Dataset:
    """Return a data set by name, or a folder's by its path, split; ``size`` (height, width) is for folders alone.

    A folder holds ``train/<class>/`` and ``test/<class>/``, or ``<class>/`` alone, of which a fixed sixth becomes the test split.
    Raises DataError when it is not there or does not match its checksum.
    """
    root = data_root()
    if name == "cifar10":
        return _split(name, sources.CIFAR10_NAMES, *sources.cifar10(root), held_out=2500, flip=True)
    if name == "cifar100":
        return _split(name, *sources.cifar100(root), held_out=2500, flip=True)
    if name == "svhn":
        return _split(name, tuple("0123456789"), *sources.svhn(root), held_out=2500, flip=False)
    if name == "digits":
        examples = sources.digits()
        return _split(name, tuple("0123456789"), examples.take(slice(0, 1497)), examples.take(slice(1497, None)), held_out=200, flip=False)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name!r} is neither a data set ({', '.join(NAMED)}) nor a folder of class sub-folders: give its path with --data")
    return _folder(folder, size)


def _folder(folder: Path, size: tuple[int, int] | None) -> Dataset:
    if (folder / "train").is_dir():
        names = class_names(folder / "train")
        train = read_folder(folder / "train", names, size)
        if not (folder / "test").is_dir():
            raise DataError(f"{folder} holds train/ but no test/: put both there, or the class sub-folders alone")
        test = read_folder(folder / "test", names, train.image.shape[1:3] if size is None else size)
    else:
        names = class_names(folder)
        everything = read_folder(folder, names, size)
        sixth = len(everything) // 6
        train, test = everything.take(slice(sixth, None)), everything.take(slice(0, sixth))
    height, width = train.image.shape[1:3]
    if height % 4 or width % 4 or min(height, width) < 8:
        raise DataError(f"{folder}: {width} x {height} pixels; the network halves twice, so give a multiple of 4 from 8 up: --set size=32")
    if len(train) < SMALLEST:
        raise DataError(f"{folder} holds {len(train)} images to train on; {SMALLEST} are the least to hold any out of")
    missing = [name for index, name in enumerate(names) if (train.label == index).sum() < 8]
    if missing:
        raise DataError(f"{folder}: fewer than 8 training images of {', '.join(missing)}")
    name = folder.resolve().name
    return _split(f"{name} (a folder)" if name in NAMED else name, names, train, test, held_out=min(2500, len(train) // 10), flip=True)


def _split(name: str, names: tuple[str, ...], train: Split, test: Split, held_out: int, flip: bool) -> Dataset:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    digest = hashlib.sha256()
    for part in (train.image, train.label, test.image, test.label):
        digest.update(np.ascontiguousarray(part).data)
    selection, calibration, rest = np.split(order, [held_out, 2 * held_out])
    return Dataset(name, names, train.take(rest), train.take(selection), train.take(calibration), test, flip, digest.hexdigest())


def load_extra(source: str, data: Dataset) -> Split:
    """Return extra labelled images for training: an .npz with ``image`` and ``label``, or a folder of the same class sub-folders.

    Labels are pseudo-labels: of the class that a generator was asked for, or of a classifier (training/pseudo_label.py).
    """
    height, width = data.train.image.shape[1:3]
    path = Path(source).expanduser()
    path = path if path.is_absolute() or path.exists() else data_root() / path
    if path.is_dir():
        return read_folder(path, data.names, (height, width))
    image, label = read_npz(path, height, width, data.names)
    if label is None:
        raise DataError(f"{path} holds no label: write pseudo-labels with python training/pseudo_label.py {path} BUNDLE")
    if len(label) == 0 or label.min() < 0 or label.max() >= len(data.names):
        raise DataError(f"{path}: labels must lie in 0 to {len(data.names) - 1} and there must be some")
    return Split(image, label)


__all__ = ["Dataset", "Labels", "Pixels", "Split", "data_root", "load", "load_extra", "load_images", "read_atlas", "read_folder"]
