"""What a bundle's JSON says: the manifest bundle.json, schema 2, and the calibrations of calibration.json."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ebjdat_serve.bounds import COUNT, NATS, Bounds
from ebjdat_serve.contract import Input as Input
from ebjdat_serve.sgld import Sampler

SCHEMA = 2
YES = "yes"


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
