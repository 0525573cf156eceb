"""Named data sets. To add one, write a reader (see training/data/archives.py) and add it to SOURCES."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from ebjdat_serve.manifest import Licence
from training.data import archives
from training.data.image_folders import Split

Read = Callable[[Path], tuple[tuple[str, ...], Split, Split]]
"""The data folder -> class names, train and test; a reader downloads missing files where it can."""


OURS = Licence("Apache-2.0", "Apache-2.0", "none stated")


@dataclass(frozen=True)
class Source:
    """The reader and splits of a data set, and properties of models trained on it."""

    read: Read
    held_out: int = 2500  # images of the selection split, and of the calibration split
    flip: bool = True  # a mirror image has the same class
    linf: float = 8 / 255  # the l-inf eps, beside its half, at which robustness is evaluated; pixels of [0,1]
    l2: float = 0.5  # and the l2 eps
    budget: str | None = None  # of training/presets.py; None: small or large, by the device
    licence: str = ""  # of weights trained on it, for the model card
    terms: Licence = field(default_factory=Licence)  # the same, for a bundle's manifest


SOURCES: dict[str, Source] = {
    "cifar10": Source(
        archives.cifar10,
        licence="Weights: Apache-2.0. CIFAR-10 (Krizhevsky 2009) states no licence; its use here follows research custom. SVHN, "
        "non-commercial, is used for evaluation only.",
        terms=OURS,
    ),
    "cifar100": Source(
        archives.cifar100,
        licence="Weights: Apache-2.0. CIFAR-100 (Krizhevsky 2009) states no licence; its use here follows research custom.",
        terms=OURS,
    ),
    "svhn": Source(
        archives.svhn,
        flip=False,
        licence="Weights of a model trained on SVHN (Netzer et al. 2011), which is for non-commercial use only.",
        terms=Licence("Apache-2.0", "non-commercial use", "non-commercial use"),
    ),
    "digits": Source(
        archives.digits,
        held_out=200,
        flip=False,
        linf=51 / 255,
        l2=1.0,
        budget="digits",
        licence="Weights: Apache-2.0. Digits: UCI, Alpaydin and Kaynak 1998, as scikit-learn ships them (CC BY 4.0).",
        terms=replace(OURS, data="CC-BY-4.0"),
    ),
}


def balls(name: str) -> tuple[float, float]:
    """Return the l-inf and the l2 eps of a data set; those of CIFAR-10 for a user's folder."""
    source = SOURCES.get(name, SOURCES["cifar10"])
    return source.linf, source.l2
