"""The HTTP contract: what requests may hold and what answers do hold. Changing a name is a breaking change."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr


class Candidate(BaseModel):
    """One class and its probability."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)
    class_: Annotated[int, Field(alias="class", description="class index")]
    label: str
    probability: float


class Flag(BaseModel):
    """E(x), the outlier score that the bundle was calibrated with, its conformal p-value, and whether that is below alpha."""

    energy: Annotated[float, Field(description="E(x) = -logsumexp of the logits, nats; lower = likelier")]
    suspicion: Annotated[float, Field(description="the calibrated score, nats; high = unlike the data; /info says which score")]
    p_value: Annotated[float, Field(description="(1 + clean calibration scores >= this one) / (n + 1)")]
    suspicious: Annotated[bool, Field(description="p_value < alpha")]


class Classified(Candidate, Flag):
    """One classified image."""

    top: list[Candidate]


class ClassifyAnswer(Classified):
    """Answer to one image on /classify."""

    alpha: float
    model: str


class ClassifyList(BaseModel):
    """Answer to a list of images on /classify."""

    results: list[Classified]
    alpha: float
    model: str


class Energies(Flag):
    """One image's energies."""

    joint_energy: Annotated[list[float], Field(description="E(x, y) for every class y, nats")]


class EnergyAnswer(Energies):
    """Answer to one image on /energy."""

    alpha: float
    model: str


class EnergyList(BaseModel):
    """Answer to a list of images on /energy."""

    results: list[Energies]
    alpha: float
    model: str


class GenerateQuery(BaseModel):
    """What to draw; GET takes it as query parameters, POST as query parameters or as a JSON object."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    class_: Annotated[StrictStr | StrictInt, Field(alias="class", description="class index or name")]
    n: Annotated[int, Field(description="how many images")] = 1
    steps: Annotated[int | None, Field(description="Langevin steps; the bundle's own number by default, and at most")] = None
    step_size: Annotated[
        float | None, Field(gt=0, le=100, description="step size in pixel units of [0,1]; the bundle's own by default")
    ] = None
    temperature: Annotated[float, Field(ge=0, le=1e4, description="noise variance in units of the bundle's own; 0: no noise")] = 1.0
    seed: Annotated[
        int | None, Field(ge=0, le=2**31 - 1, description="image i's noise depends on seed + i; drawn at random when absent")
    ] = None
    format: Literal["png", "json"] = "png"
    stream: Annotated[bool, Field(description="server-sent events: previews with energies, then what format=json answers")] = False
    every: Annotated[int | None, Field(ge=1, description="steps between previews; a tenth of all by default")] = None
    scale: Annotated[int, Field(description="PNG pixels per image pixel")] = 1


class Generated(Candidate, Flag):
    """One generated image; ``class``, ``label`` and ``probability`` are of the class asked for."""

    seed: int
    png: Annotated[str, Field(description="base64 PNG")]


class GenerateAnswer(BaseModel):
    """Answer of /generate with format=json."""

    images: list[Generated]
    steps: int
    step_size: float
    temperature: float
    sampler: str
    alpha: float
    model: str


class Health(BaseModel):
    """Whether every worker is ready."""

    status: Literal["ok", "not ready"]


class ProblemDocument(BaseModel):
    """RFC 9457."""

    title: str
    status: int
    detail: str
