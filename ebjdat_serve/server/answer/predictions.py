"""Answers of /classify and /energy."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field

from ebjdat_serve.server.answer import Attributed, Schema
from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.served_model import ServedModel


class Candidate(Schema):
    """One class and its probability."""

    class_: Annotated[int, Field(alias="class", description="class index")]
    label: str
    probability: float


class Flag(Schema):
    """E(x), the outlier score that the bundle was calibrated with, its conformal p-value, and whether that is below alpha."""

    energy: Annotated[float, Field(description="E(x) = -logsumexp of the logits, nats; lower = likelier")]
    suspicion: Annotated[float, Field(description="the calibrated score, nats; high = unlike the data; /info says which score")]
    p_value: Annotated[float, Field(description="(1 + clean calibration scores >= this one) / (n + 1)")]
    suspicious: Annotated[bool, Field(description="p_value < alpha")]


class Classified(Flag, Candidate):
    """One classified image."""

    top: list[Candidate]


class ClassifyAnswer(Attributed, Classified):
    """Answer to one image on /classify."""


class ClassifyList(Schema):
    """Answer to a list of images on /classify."""

    results: list[Classified]
    alpha: float
    model: str


class Energies(Flag):
    """One image's energies."""

    joint_energy: Annotated[list[float], Field(description="E(x, y) for every class y, nats")]


class EnergyAnswer(Attributed, Energies):
    """Answer to one image on /energy."""


class EnergyList(Schema):
    """Answer to a list of images on /energy."""

    results: list[Energies]
    alpha: float
    model: str


def flags(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Flag, which Predictions has under the same names."""
    columns = (getattr(predictions, name).tolist() for name in Flag.model_fields)
    return (dict(zip(Flag.model_fields, row, strict=True)) for row in zip(*columns, strict=True))


def classified(predictions: Predictions, labels: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Classified, classes the likeliest first."""
    for classes, probability, flag in zip(predictions.top.tolist(), predictions.probability.tolist(), flags(predictions), strict=True):
        top = [Candidate(class_=i, label=labels[i], probability=probability[i]) for i in classes]
        yield {**vars(top[0]), **flag, "top": top}


def energies(predictions: Predictions) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Energies."""
    joint_energy = predictions.joint_energy.tolist()
    return ({**flag, "joint_energy": row} for flag, row in zip(flags(predictions), joint_energy, strict=True))


def classify_answer(predictions: Predictions, listed: bool, model: ServedModel, alpha: float) -> ClassifyAnswer | ClassifyList:
    """Return the answer of /classify to one image, or to a list."""
    rows = classified(predictions, model.labels)
    if listed:
        return ClassifyList(results=[Classified(**row) for row in rows], alpha=alpha, model=model.name)
    return ClassifyAnswer(**next(rows), alpha=alpha, model=model.name)


def energy_answer(predictions: Predictions, listed: bool, model: ServedModel, alpha: float) -> EnergyAnswer | EnergyList:
    """Return the answer of /energy to one image, or to a list."""
    rows = energies(predictions)
    if listed:
        return EnergyList(results=[Energies(**row) for row in rows], alpha=alpha, model=model.name)
    return EnergyAnswer(**next(rows), alpha=alpha, model=model.name)
