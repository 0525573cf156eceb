"""Data: CIFAR-10, digits or a folder of class sub-folders as uint8 arrays, split once and for all, and augmentation.

Data is found under ``EBJDAT_DATA`` (default ``~/.cache/ebjdat_serve/data``).
"""

import hashlib
import io
import json
import os
import pickle
import tarfile
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from training.errors import DataError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]

CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_BATCHES = {  # md5 of the uint8 pixels, height x width x channel, of the official batches
    "data_batch_1": "4e54456ff66eb84aa6dad699a3ccdde5",
    "data_batch_2": "48c284263cfe015b0a5fdaf4d1b48082",
    "data_batch_3": "e56488c2b23b0954326d27e32d6995cc",
    "data_batch_4": "b6c4ab5e98dfc7c2a7bea58ad2be17ff",
    "data_batch_5": "10cfacc324af1dfb4114bf11187cade7",
    "test_batch": "6d2714505047e13831cd876923568712",
}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
SPLIT_SEED = 20250519


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, 3) uint8 and labels (N,) int64."""

    image: Pixels
    label: Labels

    def __len__(self) -> int:
        return len(self.label)

    def first(self, n: int) -> "Split":
        """Return the first n examples."""
        return Split(self.image[:n], self.label[:n])


@dataclass(frozen=True)
class Dataset:
    """Four disjoint splits: train, selection (choices and tuning), calibration (p-values only) and test."""

    name: str
    names: tuple[str, ...]
    train: Split
    selection: Split
    calibration: Split
    test: Split
    flip: bool
    sha256: str


def data_root() -> Path:
    """Return the folder that data is read from."""
    return Path(os.environ.get("EBJDAT_DATA", "~/.cache/ebjdat_serve/data")).expanduser()


def load(name: str) -> Dataset:
    """Return the data set ``cifar10`` or ``digits``, split.

    Raises DataError when it is not there or does not match its checksum.
    """
    if name == "cifar10":
        train, test = _cifar10(data_root())
        return _split(name, CIFAR10_NAMES, train, test, held_out=2500, flip=True)
    if name == "digits":
        examples = _digits()
        return _split(
            name, tuple("0123456789"), _take(examples, slice(0, 1497)), _take(examples, slice(1497, None)), held_out=200, flip=False
        )
    raise DataError(f"unknown data set {name!r}: known are cifar10 and digits")


def _take(split: Split, index: Any) -> Split:
    return Split(split.image[index], split.label[index])


def _split(name: str, names: tuple[str, ...], train: Split, test: Split, held_out: int, flip: bool) -> Dataset:
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    digest = hashlib.sha256()
    for part in (train.image, train.label, test.image, test.label):
        digest.update(np.ascontiguousarray(part).data)
    selection, calibration, rest = np.split(order, [held_out, 2 * held_out])
    return Dataset(name, names, _take(train, rest), _take(train, selection), _take(train, calibration), test, flip, digest.hexdigest())


# CIFAR-10 ----------------------------------------------------------------------------------------------------------


def _cifar10(root: Path) -> tuple[Split, Split]:
    if (root / "cifar-10-batches-py").is_dir():
        batches = {name: _python_batch(root / "cifar-10-batches-py" / name) for name in CIFAR10_BATCHES}
    elif (root / "atlas" / "labels.json").is_file():
        batches = _atlases(root / "atlas")
    elif (root / "cifar10" / "train").is_dir():
        return read_folder(root / "cifar10" / "train", CIFAR10_NAMES), read_folder(root / "cifar10" / "test", CIFAR10_NAMES)
    else:
        download_cifar10(root)
        return _cifar10(root)
    for name, expected in CIFAR10_BATCHES.items():
        if hashlib.md5(batches[name].image.tobytes()).hexdigest() != expected:
            raise DataError(f"{name}: its pixels are not the official ones; remove {root / 'cifar-10-batches-py'} and fetch it again")
    parts = [batches[name] for name in CIFAR10_BATCHES if name != "test_batch"]
    train = Split(np.concatenate([p.image for p in parts]), np.concatenate([p.label for p in parts]))
    return train, batches["test_batch"]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles what a CIFAR-10 batch holds, dicts of bytes, ints and one NumPy array, and refuses everything else."""

    ALLOWED = frozenset(
        {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("_codecs", "encode"),
            *(
                (f"numpy.{core}.{module}", name)
                for core in ("core", "_core")
                for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch does not hold {module}.{name}")
        return super().find_class(module, name)


def _python_batch(path: Path) -> Split:
    try:
        batch = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        rows, labels = batch[b"data"], batch[b"labels"]
    except (OSError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise DataError(f"{path} is not a CIFAR-10 python batch ({error}); fetch the archive again") from error
    image = np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Split(image, np.asarray(labels, dtype=np.int64))


def _atlases(folder: Path) -> dict[str, Split]:
    labels = json.loads((folder / "labels.json").read_text())
    return {name: Split(read_atlas(folder / f"{name}.webp", 32), np.asarray(labels[name], dtype=np.int64)) for name in CIFAR10_BATCHES}


def read_atlas(path: Path, tile: int) -> Pixels:
    """Return the tiles of an atlas picture in raster order, (N, tile, tile, 3) uint8."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    tiles = pixels.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, tile, tile, 3))


def read_folder(folder: Path, names: Sequence[str]) -> Split:
    """Return ``folder/<class>/*.png`` as a split in a fixed shuffled order; label i is ``names[i]``."""
    images: list[Pixels] = []
    labels: list[int] = []
    for index, name in enumerate(names):
        for path in sorted((folder / name).glob("*.png")):
            with Image.open(path) as picture:
                images.append(np.asarray(picture.convert("RGB")))
            labels.append(index)
    if not images or len({image.shape for image in images}) != 1:
        raise DataError(f"{folder} must hold sub-folders {', '.join(names)} of PNG files of one size")
    # in an order of its own, so that the first n of a split are not all of one class
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    return Split(np.stack(images)[order], np.asarray(labels, dtype=np.int64)[order])


def download_cifar10(root: Path) -> None:
    """Fetch the official archive into ``root``, check its sha256 and unpack it.

    Raises DataError when there is no network or the archive is not the official one.
    """
    root.mkdir(parents=True, exist_ok=True)
    archive = root / "cifar-10-python.tar.gz"
    if not archive.is_file():
        print(f"CIFAR-10 is not under {root}: downloading {CIFAR10_URL} (170 MB)", flush=True)
        try:
            partial = archive.with_suffix(".part")
            urllib.request.urlretrieve(CIFAR10_URL, partial)
            partial.rename(archive)
        except OSError as error:
            raise DataError(
                f"CIFAR-10 is not under {root} and cannot be downloaded ({error}). Put cifar-10-python.tar.gz from "
                "https://www.cs.toronto.edu/~kriz/cifar.html there, or set EBJDAT_DATA to a folder that holds cifar-10-batches-py/"
            ) from error
    with archive.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != CIFAR10_SHA256:
            raise DataError(f"{archive} is not the official archive (sha256 differs): remove it and try again")
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    with tarfile.open(archive) as tar:
        for name in CIFAR10_BATCHES:
            member = tar.extractfile(f"cifar-10-batches-py/{name}")
            if member is None:
                raise DataError(f"{archive} holds no {name}")
            (folder / name).write_bytes(member.read())


# digits ------------------------------------------------------------------------------------------------------------


def _digits() -> Split:
    from sklearn.datasets import load_digits  # ships its data; needed by this one preset

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(grey))
    image = np.repeat(grey[..., None], 3, axis=3)
    return Split(np.ascontiguousarray(image[order]), digits.target.astype(np.int64)[order])


# on the device -----------------------------------------------------------------------------------------------------


def to_device(image: Pixels, device: torch.device) -> Tensor:
    """Return uint8 images (N, H, W, 3) as a uint8 tensor (N, 3, H, W) on ``device``."""
    return torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(device)


def to_float(image: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0,1]."""
    return image.float() / 255.0


def augment(image: Tensor, generator: torch.Generator, *, padding: int, flip: bool) -> Tensor:
    """Return a random crop after reflection padding, and a mirror image half of the time; (N, 3, H, W) any dtype."""
    n, channels, height, width = image.shape
    device = image.device
    padded = F.pad(image.float(), (padding,) * 4, mode="reflect").to(image.dtype)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), generator=generator, device=device)
    rows = top[:, None] + torch.arange(height, device=device)
    columns = left[:, None] + torch.arange(width, device=device)
    if flip:
        mirrored = torch.rand(n, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch = torch.arange(n, device=device)[:, None, None, None]
    channel = torch.arange(channels, device=device)[None, :, None, None]
    return padded[batch, channel, rows[:, None, :, None], columns[:, None, None, :]]
