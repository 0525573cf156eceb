"""Image sets that are not like the data: noise, mixtures, one colour, other data sets, and odd pictures (odd.py)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ebjdat_serve.contract import Input
from ebjdat_serve.engines import Floats
from ebjdat_serve.pixels import Pixels, decode, encode_png, to_unit
from training.data.datasets import Dataset, data_root, read_atlas
from training.data.image_folders import load_images, spread
from training.errors import DataError
from training.evaluation.odd import ODD
from training.evaluation.rows import SEED

OOD_ATLASES = {"svhn_train_first1080": "svhn", "cifar100_test_3000": "cifar100"}  # file -> its data set
NOISE = "uniform noise"
MIXED = "interpolations"  # means of two test images
BLANK = "blank images"  # every pixel of one colour, drawn uniformly
NEAR = "cifar100_test_3000"
SET_PIXELS = 2**24
"""Pixels of a set, which is held in memory: 334 images of 224 x 224."""
IMAGENET = "imagenet_500"
ODD_SETS = (NOISE, BLANK, *ODD)
"""Sets of pictures that no set of photographs holds, as a new user tries them first."""
SHOWN_SYNSETS = {  # first and last ImageNet synset of a range; every one of these shows the class
    "bird": ((1514668, 1622779), (1795545, 1860187), (2002556, 2058221)),
    "frog": ((1641577, 1644900),),
    "dog": ((2085620, 2113978),),
    "cat": ((2123045, 2124075),),
}
SHOWN_NAMES = [
    "airliner", "wing", "amphibian", "beach_wagon", "cab", "minibus", "minivan", "police_van",
    "half_track", "tow_truck", "motor_scooter", "bow", "canoe", "catamaran", "container_ship", "dock",
    "fireboat", "gondola", "liner", "paddlewheel", "pirate", "schooner", "speedboat", "yawl",
]  # fmt: skip
"""Synsets of aeroplanes, cars, trucks and ships, and three whose one picture shows a car (motor_scooter), a deer (bow) or a ship (dock)."""


def strange_images(data: Dataset, some: Pixels, say: Callable[[str], None]) -> Iterator[tuple[str, Floats]]:
    """Yield (name, images in [0,1]) of a data set's OOD sets, ``some`` of its images for interpolation; report missing sets by ``say``."""
    height, width = some.shape[1:3]
    draw, n = np.random.default_rng(SEED), most(height, width)
    yield NOISE, to_unit(draw.integers(0, 256, (n, height, width, 3), dtype=np.uint8))
    order = draw.permutation(len(some))
    partner = np.empty_like(order)
    partner[order] = np.roll(order, 1)  # one cycle, so that no image is paired with itself
    yield MIXED, to_unit(((some.astype(np.uint16) + some[partner]) // 2).astype(np.uint8))
    colour = np.random.default_rng(SEED).integers(0, 256, (n, 1, 1, 3), dtype=np.uint8)
    yield BLANK, to_unit(np.broadcast_to(colour, (n, height, width, 3)))
    for name, source in OOD_ATLASES.items():
        if source == data.name:
            continue  # a data set is not OOD for itself
        file = data_root() / f"{name}.webp"
        if not file.is_file():
            say(f"{name}: not measured, {name}.webp is not in the data folder")
        elif (height, width) == (32, 32):
            yield name, to_unit(read_atlas(file, 32))
        else:  # as a server decodes a file of 32 x 32 pixels
            image = read_atlas(file, 32)
            shown = np.stack([decode(encode_png(one), data.input) for one in image[spread(len(image), n)]])
            yield f"{name}, enlarged", to_unit(shown)
    if data.name == "cifar10" and len(pictures := imagenet(data.input, say)):  # what is left out are pictures of its classes
        yield IMAGENET, to_unit(pictures)
    for folder in sorted((data_root() / "ood").glob("*")):
        try:
            yield folder.stem, to_unit(load_images(str(folder), data.input, SET_PIXELS // (height * width)))
        except DataError as error:
            say(f"{folder.name}: not measured, {error}")


def most(height: int, width: int) -> int:
    """Return the number of images of a set: 1000, fewer where they are large."""
    return min(1000, SET_PIXELS // (height * width))


def imagenet(contract: Input, say: Callable[[str], None]) -> Pixels:
    """Return pictures of imagenet_500 that show no CIFAR-10 class, decoded as in the server; none if the folder is missing."""
    kept: list[Path] = []
    files = sorted((data_root() / IMAGENET).glob("*.jpg"))
    for file in files:
        synset, name = file.stem.split("_", 1)
        shown = any(first <= int(synset[1:]) <= last for ranges in SHOWN_SYNSETS.values() for first, last in ranges)
        if not shown and name not in SHOWN_NAMES:
            kept.append(file)
    if not kept:
        say(f"{IMAGENET}: not measured, the folder {IMAGENET} is not in the data folder")
        return np.empty((0, contract.height, contract.width, 3), np.uint8)
    say(f"{IMAGENET}: {len(files) - len(kept)} of {len(files)} pictures show a class of CIFAR-10 and are left out")
    return np.stack([decode(file.read_bytes(), contract) for file in kept])
