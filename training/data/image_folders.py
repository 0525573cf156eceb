"""Read images and labels as arrays from folders, atlases and .npz files."""

import hashlib
import sys
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ebjdat_serve.bounds import label_fault
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.judge import accepted
from ebjdat_serve.errors import InvalidImage
from ebjdat_serve.folders import folder
from ebjdat_serve.listing import Listing, class_name, format_of, list_images, order, printable
from ebjdat_serve.pixels import decode, upright_size
from training.errors import DataError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
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
    return folder("EBJDAT_DATA", "data")


def read_atlas(path: Path, tile: int) -> Pixels:
    """Return the tiles of an atlas image in raster order, (N, tile, tile, 3) uint8."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is not an atlas of {tile} x {tile} tiles ({error})") from error
    rows, columns = pixels.shape[0] // tile, pixels.shape[1] // tile
    tiles = pixels[: rows * tile, : columns * tile].reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, tile, tile, 3))


def class_folders(folder: Path, listing: Listing) -> dict[str, list[Path]]:
    """Return the sub-folders by class name, sorted: label i is the i-th; two spellings of one name are one class."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir(), key=order):
        if entry.name.startswith("."):
            listing.skip("hidden", entry)
        elif not entry.is_dir():
            listing.skip("in no class folder", entry)
        else:
            try:
                found.setdefault(class_name(entry), []).append(entry)
            except UnicodeDecodeError as error:
                raise DataError(f"{printable(entry)}: a class needs a name in UTF-8; rename the folder") from error
    return dict(sorted(found.items()))


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the names of the classes that ``folder`` holds; raise DataError for fewer than two, and for one that no bundle may have."""
    names = tuple(class_folders(folder, Listing()))
    if len(names) < 2:
        raise DataError(f"{folder} must hold a sub-folder of images for each of two or more classes; it holds {list(names)}")
    if fault := label_fault(names):
        raise DataError(f"{folder}: {fault}; rename its folder (numbers sort in order with leading zeros: 00, 01 to 10)")
    return names


def class_files(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """Return the images of every class, including its sub-folders, with their label; label i is ``names[i]``.

    Prints the skipped files. Raises DataError unless the classes are exactly ``names``, each with an image.
    """
    names = [unicodedata.normalize("NFC", name) for name in names]
    listing = Listing()
    folders, files = class_folders(folder, listing), []
    for index, name in enumerate(names):
        before = len(listing.images)
        for home in folders.get(name, []):
            list_images(home, listing)
        files += [(file, index) for file in listing.images[before:]]
    tell(folder, listing)
    strange = [name for name in folders if name not in names]
    if strange:
        raise DataError(f"{folder} has folders of {', '.join(strange)}, which are not among the classes {', '.join(names)}: move them away")
    held = {index for _, index in files}
    empty = [name for index, name in enumerate(names) if index not in held]
    if empty:
        raise DataError(
            f"{folder} holds no images ({', '.join(accepted())}) of {', '.join(empty)}: every class needs its own sub-folder of images"
        )
    return files


def others_in(folder: Path, known: Sequence[str]) -> Listing:
    """Return the entries of a folder that are not ``known``."""
    listing = Listing()
    for entry in sorted(folder.iterdir(), key=order):
        if entry.name not in known:
            listing.skip("next to " + " and ".join(f"{name}/" for name in known), entry)
    return listing


def tell(folder: Path, listing: Listing) -> None:
    """Print the skipped files of a folder."""
    if skipped := listing.note():
        note(printable(folder), skipped)


def note(where: str, message: str) -> None:
    """Print a note about the data to stderr."""
    print(f"note: {where}: {message}", file=sys.stderr, flush=True)


def read_folder(folder: Path, names: Sequence[str], contract: Input | None = None) -> Split:
    """Return ``folder/<class>/**`` as a split in a fixed shuffled order; label i is ``names[i]``.

    With a ``contract`` every image is decoded by it as in the server; without one they must all have the same size.
    """
    (split,) = read_folders([folder], names, contract)
    return split


def read_folders(folders: Sequence[Path], names: Sequence[str], contract: Input | None = None) -> list[Split]:
    """Return a split of each folder; raise DataError naming all damaged images of all folders."""
    listed = [class_files(folder, names) for folder in folders]
    image = read_images([file for files in listed for file, _ in files], contract)
    splits, at = [], 0
    for files in listed:
        # shuffled, so that the first n of a split are not all of one class
        shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(files))
        splits.append(Split(image[at + shuffled], np.asarray([files[i][1] for i in shuffled], dtype=np.int64)))
        at += len(files)
    return splits


def read_images(files: Sequence[Path], contract: Input | None = None) -> Pixels:
    """Return the images (N, height, width, 3), decoded as in the server, by ``contract`` or at their common size.

    Raises DataError naming every damaged image.
    """
    damaged: dict[Path, str] = {}
    if contract is None:
        contract = Input(*common_size(files, damaged))
    image = np.empty((len(files), contract.height, contract.width, 3), np.uint8)
    for i, file in enumerate(files):
        if file in damaged:
            continue
        try:
            image[i] = decode(file.read_bytes(), contract)
        except (OSError, InvalidImage) as error:
            damaged[file] = reason(error)
    if damaged:
        listed = "".join(f"\n  {printable(file)}: {error}" for file, error in damaged.items())
        raise DataError(f"{len(damaged)} of {len(files)} images cannot be read; remove or replace them:{listed}")
    return image


def common_size(files: Sequence[Path], damaged: dict[Path, str]) -> tuple[int, int]:
    """Return the common (height, width) of all files, upright; raise DataError when they differ. Adds unreadable files to ``damaged``."""
    sizes: dict[tuple[int, int], Path] = {}
    for file in files:
        try:
            sizes.setdefault(upright_size(file.read_bytes()), file)
        except (OSError, InvalidImage) as error:
            damaged[file] = reason(error)
        if len(sizes) > 1:
            (a, first), (b, second) = sizes.items()
            sides = f"{printable(first)} is {a[1]} x {a[0]} and {printable(second)} {b[1]} x {b[0]} pixels"
            raise DataError(f"{sides}: they must be of one size, or resized to one", options=("--set size=32", "--size 32"))
    return next(iter(sizes), (1, 1))


def reason(error: OSError | InvalidImage) -> str:
    """Return why a file could not be read."""
    return str((isinstance(error, OSError) and error.strerror) or error)


def load_images(source: str, contract: Input, most: int | None = None) -> Pixels:
    """Return unlabelled images (N, height, width, 3) of a folder, decoded by ``contract``, an .npz with ``image``, or an image of tiles.

    ``most``: so many of them at most, at equal distances.
    """
    height, width = contract.height, contract.width
    path = Path(source).expanduser()
    path = path if path.is_absolute() or path.exists() else data_root() / path
    if path.is_dir():
        listing = list_images(path)
        tell(path, listing)
        if not listing.images:
            raise DataError(f"{printable(path)} holds no images ({', '.join(accepted())})")
        return read_images([listing.images[i] for i in spread(len(listing.images), most)], contract)
    if path.suffix == ".npz":
        image = read_npz(path, height, width)[0]
        return image[spread(len(image), most)]
    if path.is_file() and format_of(path) in accepted() and height == width:
        image = read_atlas(path, height)
        return image[spread(len(image), most)]
    raise DataError(f"{path} is not a folder of images, an .npz or an atlas of {height} x {width} tiles")


def spread(count: int, most: int | None) -> NDArray[np.int64]:
    """Return the places of ``most`` of ``count`` images, at equal distances: a folder or an atlas may be sorted by class."""
    if most is None or count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def read_npz(path: Path, height: int, width: int, names: Sequence[str] = ()) -> tuple[Pixels, Labels | None]:
    """Return ``image`` (N, height, width, 3) uint8 and, if it is there, ``label`` (N,) of an .npz, as generated data is published."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            image = arrays["image"]
            label = arrays["label"].astype(np.int64) if "label" in arrays else None
            labelled = arrays["names"].tolist() if "names" in arrays else list(names)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} must be an .npz with image (N, {height}, {width}, 3) uint8 and label (N,): {error}") from error
    if image.dtype != np.uint8 or image.shape[1:] != (height, width, 3) or (label is not None and label.shape != image.shape[:1]):
        raise DataError(f"{path}: image is {image.dtype} {image.shape}; it must be uint8 (N, {height}, {width}, 3), label (N,)")
    if names and [unicodedata.normalize("NFC", name) for name in labelled] != [unicodedata.normalize("NFC", name) for name in names]:
        raise DataError(f"{path} is labelled for the classes {labelled[:5]} …, not for {list(names)[:5]} …: label it again")
    return image, label
