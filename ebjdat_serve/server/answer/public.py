"""The public profile: what of each answer a client without a key of scope ``operate`` is told.

Each schema here has the fields of the full one that are left. Coarse answers make attacks by queries dearer, not impossible:
docs/security.md.
"""

from typing import Annotated

from pydantic import AfterValidator, Field

from ebjdat_serve.manifest import Input, Provenance
from ebjdat_serve.server.answer import Schema
from ebjdat_serve.server.answer.images import GenerateAnswer, Generated, GeneratePreviewEvent, PngHeaders
from ebjdat_serve.server.answer.predictions import Classified, ClassifyAnswer, ClassifyList
from ebjdat_serve.server.answer.status import Health, Index, Info, LimitsInfo, Models
from ebjdat_serve.server.settings import Profile

DECIMALS = 2
"""Decimals of a probability."""
PUBLIC_DATASETS = ("cifar10", "cifar100", "svhn", "digits")
"""Data sets that everybody can download, as provenance names them; a folder of images never has one of these names."""

Rounded = Annotated[float, AfterValidator(lambda p: round(p, DECIMALS)), Field(description=f"rounded to {DECIMALS} decimals")]


def round_all(values: str) -> str:
    """Return comma-separated probabilities, each rounded."""
    return ",".join(f"{round(float(value), DECIMALS):g}" for value in values.split(","))


class PublicClassified(Schema):
    """One classified image."""

    class_: Annotated[int, Field(alias="class", description="class index")]
    label: str
    probability: Rounded
    suspicious: Annotated[bool | None, Field(description="null: the model is not calibrated")]


class PublicClassifyAnswer(PublicClassified):
    """Answer to one image on /classify."""

    model: str


class PublicClassifyList(Schema):
    """Answer to a list of images on /classify."""

    results: list[PublicClassified]
    model: str


class PublicGenerated(PublicClassified):
    """One generated image; ``class``, ``label`` and ``probability`` are of the class asked for."""

    seed: int
    png: Annotated[str, Field(description="base64 PNG")]


class PublicGenerateAnswer(Schema):
    """Answer of /generate with format=json."""

    images: list[PublicGenerated]
    steps: int
    step_size: float
    temperature: float
    sampler: str
    model: str


class PublicPreviewEvent(Schema):
    """Data of a preview event of /generate with stream=true: a PNG of all images."""

    step: int
    steps: int
    png: Annotated[str, Field(description="base64 PNG")]
    model: str


class PublicPngHeaders(Schema):
    """Headers of /generate with format=png; lists are comma-separated, one value per image."""

    class_: Annotated[str, Field(alias="X-Class", description="class index")]
    label: Annotated[str, Field(alias="X-Label", description="percent-encoded")]
    seed: Annotated[str, Field(alias="X-Seed", description="of the first image; image i has the seed + i")]
    steps: Annotated[str, Field(alias="X-Steps")]
    step_size: Annotated[str, Field(alias="X-Step-Size")]
    temperature: Annotated[str, Field(alias="X-Temperature")]
    probability: Annotated[str, AfterValidator(round_all), Field(alias="X-Probability", description=f"rounded to {DECIMALS} decimals")]
    model: Annotated[str, Field(alias="X-Model", description="percent-encoded")]
    content_origin: Annotated[str, Field(alias="X-Content-Origin")]


class PublicModelEntry(Schema):
    """A model of this server."""

    name: str
    model: str
    ready: bool
    default: bool


class PublicModels(Schema):
    """The models of this server, the default first."""

    models: list[PublicModelEntry]


class PublicInfo(Schema):
    """The model, its classes and input, and the limits of a request."""

    model: str
    labels: list[str]
    input: Input
    limits: LimitsInfo


PUBLIC_SCHEMAS: dict[type[Schema], type[Schema]] = {
    Classified: PublicClassified,
    ClassifyAnswer: PublicClassifyAnswer,
    ClassifyList: PublicClassifyList,
    Generated: PublicGenerated,
    GenerateAnswer: PublicGenerateAnswer,
    GeneratePreviewEvent: PublicPreviewEvent,
    PngHeaders: PublicPngHeaders,
    Info: PublicInfo,
    Health: Health,
    Models: PublicModels,
    Index: Index,
}
"""The public schema of each full one; an answer that is not here has none."""


def told(answer: Schema, profile: Profile) -> Schema:
    """Return what of ``answer`` a profile tells; raise KeyError for an answer that the public profile does not have."""
    if profile == "full":
        return answer
    return PUBLIC_SCHEMAS[type(answer)].model_validate(answer, from_attributes=True)


def of_public_data(provenance: Provenance) -> bool:
    """Return whether the weights and the prior come from public data alone.

    The prior and the generated images are statistics of the training set, so those of private images are told only with --allow-generate.
    Weights that training started from (--init) and extra images are of unknown origin.
    """
    return provenance.dataset in PUBLIC_DATASETS and not provenance.init_sha256 and not provenance.configuration.get("extra")
