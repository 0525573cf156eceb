"""What a bundle's JSON says: the manifest bundle.json, schema 2, and the calibrations of calibration.json."""

import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.bounds import COUNT, NATS, Bounds
from ebjdat_serve.contract import Input as Input
from ebjdat_serve.errors import BundleError
from ebjdat_serve.sgld import Sampler

SCHEMA = 2
YES = "yes"
OF_IMAGES = "images"
"""The name of the calibration that was made of images, calibration.json; others are of recorded scores."""
MOST_SCORES, MOST_SOURCES, MOST_REASONS = 10_000, 1000, 100
"""What a calibration of recorded scores holds at most: scores (p-values down to 1/10,001), files, and reasons why rows are not in it."""
CALIBRATION_NAME = re.compile(r"(?!images$)[a-z0-9][a-z0-9_-]{0,39}")


@dataclass(frozen=True)
class Capabilities:
    """What can be asked of a model: "yes", or the reason why it cannot."""

    energy: str = YES  # E(x) and E(x, y); never of a model that gives probabilities, whose logs are normalised
    features: str = YES  # what the last layer takes, an output of classify.onnx
    gradient: str = YES
    generate: str = YES


@dataclass(frozen=True)
class Licence:
    """Under which licences code, weights and training data are, as SPDX names or in words; "unknown" where nobody has said."""

    code: str = "unknown"
    weights: str = "unknown"
    data: str = "unknown"


@dataclass(frozen=True)
class Provenance:
    """Where the weights come from."""

    git: str
    preset: str
    seed: Annotated[int, COUNT]
    dataset: str
    data_sha256: str
    steps: Annotated[int, COUNT]
    planned_steps: Annotated[int, COUNT]
    rollbacks: Annotated[int, COUNT]
    init_sha256: str
    started: str
    configuration: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedPrior:
    """The images that the class Gaussians of prior.safetensors were fitted to, where training did not fit them."""

    dataset: str
    images: list[Annotated[int, COUNT]]  # of each class; 0: it has no prior, so that nothing is drawn of it


@dataclass(frozen=True)
class FileEntry:
    """The expected size and sha256 of one file."""

    sha256: str
    bytes: Annotated[int, COUNT]


@dataclass(frozen=True)
class Manifest:
    """bundle.json."""

    name: str
    version: str
    architecture: dict[str, Any]  # family and the family's own sizes: ebjdat_serve.networks reads them
    labels: list[str]
    input: Input
    sampler: Sampler
    provenance: Provenance
    files: dict[str, FileEntry]
    output: Literal["logits", "probabilities"] = "logits"  # the first output of classify.onnx, by its name
    capabilities: Capabilities = field(default_factory=Capabilities)
    licence: Licence = field(default_factory=Licence)
    prior: FittedPrior | None = None  # None: there is none, or it was fitted in training, to every class
    schema: int = SCHEMA

    @property
    def drawn(self) -> list[int]:
        """Return the classes that images can be drawn of, if any can."""
        return [y for y in range(len(self.labels)) if self.prior is None or self.prior.images[y]]

    @property
    def imported(self) -> bool:
        """Whether the network was trained elsewhere: neither its training images nor the attacks that it was to withstand are known."""
        return not self.provenance.planned_steps


@dataclass(frozen=True)
class Calibration:
    """Energies and OOD scores taken through one served graph, each sorted, and the temperature of p(y|x) (the others keep 1).

    The OOD score, which ``suspicious`` thresholds, is the sum of the terms of ``views`` (views.safetensors has what they were fitted to).
    The images are a split's, a share ``handled`` of them after a recompression, a resize or the like: p-values speak of that mixture.
    """

    of: str
    precision: str
    dataset: str
    handled: Annotated[float, Bounds(0.0, 1.0)]
    temperature: Annotated[float, Bounds(1e-3, 1e3)]
    energies: list[Annotated[float, NATS]]  # none where the model has no energy
    views: list[str]
    left_out: dict[str, str]  # views that are not used, and why
    reviewed: list[str]  # what `decision` looks at: "ood", and "margin" where it was calibrated
    reach_steps: Annotated[int, Bounds(0, 1000)]  # of the walk that "reach" was calibrated with, on the first of the images; 0: it was not
    scores: list[Annotated[float, NATS]]


def moment(text: str) -> str:
    """Return a time with a zone to the second, UTC; raise ValueError or OverflowError for none."""
    return datetime.fromisoformat(text).astimezone(UTC).isoformat(" ", "seconds").removesuffix("+00:00")


@dataclass(frozen=True)
class Source:
    """A file that scores were read from: its name, the sha256 of what was read, and how many lines that was."""

    file: str
    sha256: str
    lines: Annotated[int, COUNT]


@dataclass(frozen=True)
class RecordedCalibration:
    """calibration.NAME.json: scores of images that were sent in a period, as the audit log has them, sorted by the OOD score.

    Views, their ranks and the temperature are those of the calibration on images; there are no scores of the walk of check=reach.
    """

    name: str
    made: str
    since: str  # the first and the last of the images
    until: str
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    scored_by: str  # sha256 of what decides scores: scored_by.py
    images: Annotated[int, COUNT]  # of the period, of which ``scores`` are all, or some at random
    skipped: dict[str, Annotated[int, COUNT]]  # rows that are not among them, by reason
    sources: list[Source]
    scores: list[Annotated[float, NATS]]
    margins: list[Annotated[float, NATS]]  # of the same images

    def __post_init__(self) -> None:
        """Raise BundleError for a name or a time that is none, and for scores that are not sorted or not of as many images."""
        if not CALIBRATION_NAME.fullmatch(self.name):
            raise BundleError(f"name {self.name[:40]!r} is no name of a calibration")
        for text in (self.made, self.since, self.until):
            try:
                valid = len(text) <= 40 and datetime.fromisoformat(text).tzinfo is not None and bool(moment(text))
            except (ValueError, OverflowError):
                valid = False
            if not valid:
                raise BundleError(f"{text[:40]!r} is no time with a zone, as ISO 8601 writes it")
        n = len(self.scores)
        if n > MOST_SCORES or len(self.sources) > MOST_SOURCES or len(self.skipped) > MOST_REASONS:
            raise BundleError(f"of {n} scores, {len(self.sources)} files and {len(self.skipped)} reasons it holds more than it may hold")
        if self.scores != sorted(self.scores) or not n or len(self.margins) != n or self.images < n:
            raise BundleError("scores must be sorted, and margins of as many images")

    @property
    def period(self) -> str:
        """The period in words: its first and last second, UTC."""
        return f"{moment(self.since)} to {moment(self.until)} UTC"

    @property
    def dataset(self) -> str:
        """What p-values speak of, in words."""
        return f"{len(self.scores)} images recorded {self.period} ({self.name})"

    @property
    def guarantee(self) -> str:
        """What p-values by these scores do, in words."""
        return (
            f"hold for images exchangeable with the {len(self.scores):,} recorded {self.period}; whoever could send images in that period, "
            "an attacker too, shaped it"
        )

    def in_place_of(self, of_images: Calibration) -> Calibration:
        """Return this as the calibration to serve, with views and temperature of the one on images, and no energies: none are served."""
        return replace(of_images, dataset=self.dataset, handled=0.0, energies=[], reach_steps=0, scores=self.scores)

    def reviewed(self, names: list[str]) -> dict[str, NDArray[np.float32]]:
        """Return the named scores (n,) that `decision` looks at, high = suspicious, of the same images in order."""
        found = {"ood": np.asarray(self.scores, np.float32), "margin": -np.asarray(self.margins, np.float32)}
        return {name: found[name] for name in names}
