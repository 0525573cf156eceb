"""Pictures and labels as arrays, read from folders, atlases and .npz files, whatever they are of."""

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ebjdat_serve.errors import InvalidImage
from ebjdat_serve.pixels import decode
from training.errors import DataError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})  # what the server reads
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

    def sha256(self) -> str:
        """Return the sha256 of pixels and labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.image).data)
        digest.update(np.ascontiguousarray(self.label).data)
        return digest.hexdigest()

    def take(self, index: NDArray[np.intp] | slice) -> "Split":
        """Return the examples at ``index``."""
        return Split(self.image[index], self.label[index])


def data_root() -> Path:
    """Return the folder that data is read from."""
    return Path(os.environ.get("EBJDAT_DATA", "~/.cache/ebjdat_serve/data")).expanduser()


def read_atlas(path: Path, tile: int) -> Pixels:
    """Return the tiles of an atlas picture in raster order, (N, tile, tile, 3) uint8."""
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is not a sheet of {tile} x {tile} tiles ({error})") from error
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    tiles = pixels[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, tile, tile, 3))


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the sub-folders, sorted: label i is the i-th."""
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(names) < 2:
        raise DataError(f"{folder} must hold a sub-folder of pictures for each of two or more classes; it holds {list(names)}")
    return names


def read_folder(folder: Path, names: Sequence[str], size: tuple[int, int] | None = None) -> Split:
    """Return ``folder/<class>/*`` as a split in a fixed shuffled order; label i is ``names[i]``.

    With a ``size`` (height, width) every picture is squashed to it as the server does; without one they must all have the same.
    """
    files = [(path, index) for index, name in enumerate(names) for path in pictures(folder / name)]
    if not files:
        raise DataError(f"{folder} must hold sub-folders {', '.join(names)} of pictures ({', '.join(sorted(SUFFIXES))})")
    if size is None:
        size = common_size([path for path, _ in files])
    # in an order of its own, so that the first n of a split are not all of one class
    order = np.random.default_rng(SPLIT_SEED).permutation(len(files))
    image = np.stack([read_picture(files[i][0], *size) for i in order])
    return Split(image, np.asarray([files[i][1] for i in order], dtype=np.int64))


def pictures(folder: Path) -> list[Path]:
    """Return the picture files of a folder, sorted."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: every class needs its own sub-folder")
    return sorted(path for path in folder.iterdir() if wanted(path))


def wanted(path: Path) -> bool:
    """Return whether a file is a picture by its name; hidden files, such as a Mac's ._a.png, are not."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def read_picture(path: Path, height: int, width: int) -> Pixels:
    """Return one picture (height, width, 3), decoded as the server decodes it; raise DataError naming the file."""
    try:
        return decode(path.read_bytes(), height, width)
    except (OSError, InvalidImage) as error:
        raise DataError(f"{path}: {error}; remove it or replace it") from error


def common_size(files: Sequence[Path]) -> tuple[int, int]:
    """Return the (height, width) that all files have; raise DataError when they differ."""
    sizes: dict[tuple[int, int], Path] = {}
    for path in files:
        try:
            with Image.open(path) as picture:
                sizes.setdefault((picture.height, picture.width), path)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{path} cannot be read ({error}); remove it or replace it") from error
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            raise DataError(f"{first} is {a[1]} x {a[0]} and {second} {b[1]} x {b[0]} pixels: give the size to squash to, --set size=32")
    return next(iter(sizes))


def load_images(source: str, height: int, width: int) -> Pixels:
    """Return unlabelled images (N, height, width, 3) of a folder of pictures, an .npz with ``image``, or a picture of tiles."""
    path = Path(source).expanduser()
    path = path if path.is_absolute() or path.exists() else data_root() / path
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if wanted(file))
        if not files:
            raise DataError(f"{path} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        return np.stack([read_picture(file, height, width) for file in files])
    if path.suffix == ".npz":
        return read_npz(path, height, width)[0]
    if path.is_file() and path.suffix.lower() in SUFFIXES and height == width:
        return read_atlas(path, height)
    raise DataError(f"{path} is no folder of pictures, no .npz and no picture of {height} x {width} tiles")


def read_npz(path: Path, height: int, width: int, names: Sequence[str] = ()) -> tuple[Pixels, Labels | None]:
    """Return ``image`` (N, height, width, 3) uint8 and, if it is there, ``label`` (N,) of an .npz, as generated data is published."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image = arrays["image"]
            label = arrays["label"].astype(np.int64) if "label" in arrays else None
            said = arrays["names"].tolist() if "names" in arrays else list(names)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} must be an .npz with image (N, {height}, {width}, 3) uint8 and label (N,): {error}") from error
    if image.dtype != np.uint8 or image.shape[1:] != (height, width, 3) or (label is not None and label.shape != image.shape[:1]):
        raise DataError(f"{path}: image is {image.dtype} {image.shape}; it must be uint8 (N, {height}, {width}, 3), label (N,)")
    if names and said != list(names):
        raise DataError(f"{path} is labelled for the classes {said[:5]} …, not for {list(names)[:5]} …: label it again")
    return image, label
