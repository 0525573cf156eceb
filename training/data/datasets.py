"""Load a data set and its splits, by name (training/data/sources.py) or from a folder of class sub-folders.

Data is found under ``EBJDAT_DATA`` (default ``~/.cache/ebjdat_serve/data``).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.contract import Input
from ebjdat_serve.listing import printable
from training.data.image_folders import (
    SPLIT_SEED,
    Labels,
    Pixels,
    Split,
    class_names,
    data_root,
    load_images,
    note,
    others_in,
    read_atlas,
    read_folder,
    read_folders,
    read_npz,
    tell,
)
from training.data.sources import SOURCES
from training.errors import DataError

SMALLEST = 60
"""The fewest images of a folder; a sixth of them is the test split."""
RAREST = 8
"""The fewest images of a class: one in each held-out split, and some to train on."""
FEW = 30
"""Classes of fewer images are named in a note."""
LEAST_CALIBRATION = 20
"""The fewest images of the calibration split: with fewer, no p-value is below 0.05."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Four disjoint splits: train, selection (choices and tuning), calibration (p-values only) and test."""

    name: str
    names: tuple[str, ...]
    train: Split
    selection: Split
    calibration: Split
    test: Split
    flip: bool  # whether a mirror image has the same class
    sha256: str
    contract: Input | None = None  # by which a folder's images were decoded; None: the images had their size

    @property
    def input(self) -> Input:
        """The contract by which further images of its kind are decoded."""
        return self.contract or Input(*self.size)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its images."""
        height, width = self.train.image.shape[1:3]
        return height, width


def load(name: str, contract: Input | None = None) -> Dataset:
    """Return the data set of a name or a folder's path; ``contract``, by which images are decoded, is only for folders.

    A folder holds ``train/<class>/`` and ``test/<class>/``, or just ``<class>/``, of which a fixed sixth becomes the test split;
    at least 60 images are needed. Splits are stratified; skipped files and classes of few images are printed.
    Raises DataError when the data is missing or does not match its checksum.
    """
    if name in SOURCES:
        source = SOURCES[name]
        return _split(name, *source.read(data_root()), source.held_out, source.flip)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise DataError(f"{name!r} is neither a data set ({', '.join(SOURCES)}) nor an existing folder of class sub-folders")
    return replace(_folder(folder, contract), contract=contract)


def _folder(folder: Path, contract: Input | None) -> Dataset:
    apart = (folder / "train").is_dir()
    if apart:
        names, train, test = _train_and_test(folder, contract)
    else:
        names = class_names(folder)
        train = read_folder(folder, names, contract)
        test = train.take(slice(0, 0))
    least = SMALLEST - SMALLEST // 6 if apart else SMALLEST
    if len(train) < least:
        what = f"{least} in train/" if apart else f"{least}"
        raise DataError(f"{folder} holds {len(train)} images to train on and hold out from; {what} are the least: add some")
    rare = [f"{name} ({n})" for name, n in zip(names, np.bincount(train.label), strict=True) if n < RAREST]
    if rare:
        raise DataError(f"{folder}: fewer than {RAREST} training images of {', '.join(rare)}: add some, or leave the class out")
    name = printable(folder.resolve().name)
    return _stratified(f"{name} (a folder)" if name in SOURCES else name, names, train, test)


def _train_and_test(folder: Path, contract: Input | None) -> tuple[tuple[str, ...], Split, Split]:
    names = class_names(folder / "train")
    if not (folder / "test").is_dir():
        raise DataError(f"{folder} holds train/ but no test/: put both there, or the class sub-folders alone")
    tell(folder, others_in(folder, ("train", "test")))
    there = class_names(folder / "test")
    alone = {"train/": [name for name in names if name not in there], "test/": [name for name in there if name not in names]}
    differences = [f"{where} alone has {', '.join(some)}" for where, some in alone.items() if some]
    if differences:
        raise DataError(f"{folder}: {'; '.join(differences)}: both must hold the same classes")
    train, test = read_folders([folder / "train", folder / "test"], names, contract)
    return names, train, test


def _stratified(name: str, names: tuple[str, ...], train: Split, test: Split) -> Dataset:
    """Split a folder into parts that hold the classes in proportion, at least one image of each."""
    n = len(train)
    tested = 0 if len(test) else n // 6
    held = min(2500, (n - tested) // 10)
    sizes = [max(held, 8), max(held, LEAST_CALIBRATION)]
    digest = hashlib.sha256(b"stratified")  # so that bundles of earlier splits are not confused with these
    for part in (train.image, train.label, test.image, test.label):
        digest.update(np.ascontiguousarray(part).data)
    if tested:
        own, *indices = parts_of(train.label, [tested, *sizes])
        test = train.take(own)
    else:
        indices = parts_of(train.label, sizes)
    selection, calibration, rest = (train.take(index) for index in indices)
    _warn_of_few(name, names, {"train": rest, "selection": selection, "calibration": calibration, "test": test})
    return Dataset(name, names, rest, selection, calibration, test, True, digest.hexdigest())


def _warn_of_few(name: str, names: tuple[str, ...], parts: dict[str, Split]) -> None:
    counts = {part: np.bincount(split.label, minlength=len(names)) for part, split in parts.items()}
    few = [
        f"{label} ({', '.join(f'{part} {count[index]}' for part, count in counts.items())})"
        for index, label in enumerate(names)
        if sum(count[index] for count in counts.values()) < FEW
    ]
    if few:
        note(name, f"few images of {', '.join(few)}: figures of {'it' if len(few) == 1 else 'them'} are uncertain")
    n = len(parts["calibration"])
    if n < 99:
        least = f"p-values are multiples of 1/{n + 1}, and an alpha of {1 / (n + 1):.2g} or less flags nothing"
        note(name, f"{n} images calibrate the flag: {least}")


def parts_of(label: Labels, sizes: Sequence[int]) -> list[NDArray[np.intp]]:
    """Return the indices of disjoint parts of these sizes, and of the rest, in a fixed shuffled order.

    Every part but the rest holds the classes in proportion to what is left, and at least one image of each.
    """
    left = np.random.default_rng(SPLIT_SEED).permutation(len(label))
    found = []
    for size in sizes:
        y = label[left]
        count = np.bincount(y)
        by_class = np.argsort(y, kind="stable")
        place = np.empty_like(left)  # index of an image within its class
        place[by_class] = np.arange(len(y)) - (np.cumsum(count) - count)[y[by_class]]
        taken = place < shares(count, size)[y]
        found.append(left[taken])
        left = left[~taken]
    return [*found, left]


def shares(count: Labels, size: int) -> Labels:
    """Return the number of each class, in proportion to ``count`` and ``size`` in total: by largest remainder, at least one of each."""
    exact = count * size / count.sum()
    share: Labels = np.maximum(np.floor(exact), 1).astype(np.int64)
    while share.sum() < size:
        share[np.argmax(exact - share)] += 1
    while share.sum() > max(size, len(count)):
        share[np.argmax(np.where(share > 1, share - exact, -np.inf))] -= 1
    return share


def _split(name: str, names: tuple[str, ...], train: Split, test: Split, held_out: int, flip: bool) -> Dataset:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    digest = hashlib.sha256()
    for part in (train.image, train.label, test.image, test.label):
        digest.update(np.ascontiguousarray(part).data)
    selection, calibration, rest = np.split(order, [held_out, 2 * held_out])
    return Dataset(name, names, train.take(rest), train.take(selection), train.take(calibration), test, flip, digest.hexdigest())


def load_extra(source: str, data: Dataset) -> Split:
    """Return extra labelled images for training: an .npz with ``image`` and ``label``, or a folder of the same class sub-folders.

    Labels are pseudo-labels: the class requested from a generator, or predicted by a classifier (training/pseudo_label.py).
    """
    height, width = data.train.image.shape[1:3]
    path = Path(source).expanduser()
    path = path if path.is_absolute() or path.exists() else data_root() / path
    if path.is_dir():
        return read_folder(path, data.names, data.input)
    image, label = read_npz(path, height, width, data.names)
    if label is None:
        raise DataError(f"{path} holds no label: write pseudo-labels with python training/pseudo_label.py {path} BUNDLE")
    if len(label) == 0 or label.min() < 0 or label.max() >= len(data.names):
        raise DataError(f"{path}: labels must be from 0 to {len(data.names) - 1}, at least one")
    return Split(image, label)


__all__ = ["Dataset", "Labels", "Pixels", "Split", "data_root", "load", "load_extra", "load_images", "read_atlas", "read_folder"]
