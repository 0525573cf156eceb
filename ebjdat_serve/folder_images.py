"""The images of a folder to calibrate on, decoded as the server does it when their turn comes, and their labels.

Pixels of one chunk are held at a time.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve import strict_json
from ebjdat_serve.bounds import class_number, seen_as
from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.decoding.judge import accepted
from ebjdat_serve.errors import EbjdatError, InvalidImage, cause
from ebjdat_serve.handling import CALIBRATION, UNTOUCHED, handled
from ebjdat_serve.listing import SHOWN, Listing, class_name, list_images, printable
from ebjdat_serve.manifest import Input
from ebjdat_serve.pixels import Pixels, decode

FEWEST = 20
"""Images below which nothing is calibrated: the smallest p-value of 19 is 1/20, which no usual alpha is above."""
CHUNK, CHUNK_PIXELS, WALK_PIXELS = 256, 2**20, 2**18
"""Images of a chunk at most, and their pixels: 20 of 224 x 224; of a chunk that walks, whose gradients take more memory: 5."""
SERVED = Limits(jpeg_draft=True)
"""What `serve` decodes by without options."""
SEEDS = {"fit": 0, "ranks": 1, "calibration": CALIBRATION, "held back": 4}
Say = Callable[[str], None]
Places = NDArray[np.int64]


@dataclass
class FolderImages:
    """The images of a folder, read by their places; those that cannot be read are left out, with the reason."""

    files: list[Path]
    contract: Input
    say: Say
    unread: dict[Path, str] = field(default_factory=dict)
    turns: int = 0  # images to come, in all passes
    done: int = 0
    since: float = field(default_factory=time.monotonic)
    told: float = 0.0

    def chunks(self, places: Places, pixels: int = CHUNK_PIXELS) -> Iterator[tuple[Places, Pixels]]:
        """Yield places and images (n, H, W, 3) of those that can be read, in order; raise EbjdatError where fewer than half can."""
        size = max(1, min(CHUNK, pixels // (self.contract.height * self.contract.width)))
        read: list[Pixels] = []
        there: list[int] = []
        lost = 0
        for place in places:
            if (image := self.decoded(self.files[place])) is not None:
                read.append(image)
                there.append(int(place))
            elif 2 * (lost := lost + 1) > len(places):
                raise EbjdatError(f"more than half of the images cannot be read: {self.reasons()}")
            self.progress()
            if len(read) == size:
                yield np.array(there), np.stack(read)
                read, there = [], []
        if read:
            yield np.array(there), np.stack(read)

    def mixed(self, places: Places, kind: str, pixels: int = CHUNK_PIXELS) -> Iterator[tuple[Places, Pixels]]:
        """Yield the same, half of the images lightly handled."""
        for there, images in self.chunks(places, pixels):
            yield there, handled_each(images, there, SEEDS[kind], UNTOUCHED)

    def decoded(self, file: Path) -> Pixels | None:
        """Return the image in a file as the model takes it, None if it cannot be read."""
        try:
            if file.stat().st_size > SERVED.max_bytes:
                raise InvalidImage(f"the image has {file.stat().st_size} bytes; the limit is {SERVED.max_bytes}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, of each strange tag of each image
                return decode(file.read_bytes(), self.contract, SERVED)
        except (InvalidImage, OSError) as error:
            self.unread[file] = cause(error)
            return None

    def reasons(self) -> str:
        """Return why the first images that cannot be read cannot."""
        first = "; ".join(f"{printable(file.name)}: {why}" for file, why in sorted(self.unread.items())[:SHOWN])
        return first + ("; …" if len(self.unread) > SHOWN else "")

    def progress(self) -> None:
        """Say how far it is, every ten seconds."""
        self.done += 1
        now = time.monotonic()
        if now - max(self.told, self.since) >= 10:
            self.told = now
            left = (now - self.since) / self.done * (self.turns - self.done)
            self.say(f"{self.done:,} of {self.turns:,} images, {len(self.unread)} unreadable, about {duration(left)} left")


def handled_each(images: Pixels, places: Places, seed: int, untouched: float, variant: int = 0) -> Pixels:
    """Return images, each handled by what its place draws, so that it does not depend on the chunk that it is in."""
    each = zip(images, places, strict=True)
    return np.concatenate([handled(image[np.newaxis], seed, untouched, (int(place), variant)) for image, place in each])


def listed_images(folder: Path, what: str = "calibration", least: int = FEWEST) -> Listing:
    """Return the images in a folder; raise EbjdatError for what is none, and for fewer than ``what`` takes."""
    if not folder.is_dir():
        raise EbjdatError(f"{printable(folder)} is not a folder")
    listing = list_images(folder)
    if (n := len(listing.images)) < least:
        noted = f"; {listing.note()}" if listing.skipped else ""
        raise EbjdatError(f"{printable(folder)} holds {n} images ({', '.join(accepted())}); a {what} takes {least} at least{noted}")
    return listing


def labels_of(files: list[Path], folder: Path, labels: list[str], folders: Mapping[str, str]) -> tuple[Places | None, str]:
    """Return the class of each image by the sub-folder of ``folder`` that it is in, -1 for one beside them, and what to say of it.

    A sub-folder is named as a label or a class's number, or ``folders`` tells its label. Without any that is, there are no labels. Raises
    EbjdatError where some are and others are not.
    """
    parts = [file.relative_to(folder).parts for file in files]
    try:
        tops = {part[0]: class_name(folder / part[0]) for part in parts if len(part) > 1}
    except ValueError:
        raise EbjdatError(f"{printable(folder)}: the name of a sub-folder is not UTF-8: rename it") from None
    known = {seen_as(name): index for index, name in enumerate(labels)}
    wrong = [name for name in folders.values() if seen_as(name) not in known and class_number(name, len(labels)) is None]
    if wrong:
        raise EbjdatError(f"{wrong[0][:40]!r} is no label of the model: --folders tells labels by the names of sub-folders")

    def index(name: str) -> int | None:
        said = folders.get(name, name)
        return known.get(seen_as(said), class_number(said, len(labels)))

    found = {top: index(name) for top, name in tops.items()}
    strange = sorted(tops[top] for top, place in found.items() if place is None)
    if len(strange) == len(found):
        if not found:
            return None, "without labels, since there are no sub-folders"
        return None, f"without labels, since no sub-folder is named as one ({strange[0][:40]!r}); --folders FILE tells their labels"
    if strange:
        raise EbjdatError(
            f"{printable(folder)}: of {len(found)} sub-folders {len(strange)} are not named as a label, {strange[0][:40]!r} first: "
            "rename them, move them away, or tell their labels (--folders FILE)"
        )
    label = np.array([found[part[0]] if len(part) > 1 else -1 for part in parts], np.int64)
    beside = int((label < 0).sum())
    return label, f"with labels of {len(found)} sub-folders" + (f", {beside} beside them without" if beside else "")


def read_folders(file: Path | None) -> dict[str, str]:
    """Return labels by the names of sub-folders, of a JSON object; raise EbjdatError for a file that holds none."""
    if file is None:
        return {}
    try:
        said: Any = strict_json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise EbjdatError(f"{printable(file)} cannot be read: {cause(error)}") from error
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
        example = json.dumps({"n02123045": "tabby cat"})
        raise EbjdatError(f"{printable(file)} must be a JSON object of labels by the names of sub-folders, such as {example}")
    return said


def duration(seconds: float) -> str:
    """Return a time in words."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
