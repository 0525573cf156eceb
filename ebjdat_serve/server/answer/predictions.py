"""Answers of /classify and /energy."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ebjdat_serve.server.answer import Attributed, Schema
from ebjdat_serve.server.payloads import Checked, Predictions
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.served_model import ServedModel


class Candidate(Schema):
    """One class and its probability."""

    class_: Annotated[int, Field(alias="class", description="class index")]
    label: str
    probability: float


COLUMNS = ("energy", "suspicion", "p_value", "suspicious", "margin", "margin_p_value")
"""Fields of a Flag that Predictions has under the same names."""


class Flag(Schema):
    """Two questions: is the image like the data (OOD score), and is its label within reach (margin)? And what follows from both."""

    energy: Annotated[
        float | None, Field(description="E(x) = -logsumexp of the logits, nats; lower = likelier; null: the model has none, /info says why")
    ]
    suspicion: Annotated[float, Field(description="the OOD score, nats; high = unlike the data; /info says what it is")]
    p_value: Annotated[
        float | None, Field(description="(1 + clean calibration scores >= this one) / (n + 1); null, as the next: not calibrated")
    ]
    suspicious: Annotated[bool | None, Field(description="p_value < alpha")]
    why: Annotated[str | None, Field(description="the view that finds the image strangest: a reason where it is suspicious")]
    margin: Annotated[float, Field(description="largest less second logit, nats: small where the label is within reach of a small change")]
    margin_p_value: Annotated[
        float | None, Field(description="(1 + clean calibration margins <= this one) / (n + 1); absent where the calibration has none")
    ] = None
    decision: Annotated[
        Literal["accept", "review"] | None, Field(description="review: --review-share of clean images go there; null: not calibrated")
    ]
    reasons: Annotated[
        list[str] | None,
        Field(description="of review: ood, margin, reach; by p-values among the images that all of them were calibrated on"),
    ]
    reach_score: Annotated[
        float | None, Field(description="with check=reach, absent without: the runner-up's mean lead along a walk towards it, nats")
    ] = None
    reach_p_value: Annotated[
        float | None, Field(description="with check=reach, absent without: (1 + clean calibration scores >= this one) / (n + 1)")
    ] = None
    stable: Annotated[
        bool | None, Field(description="with check=reach, absent without: a search within the radius found no other label; no proof")
    ] = None


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


def flags(predictions: Predictions, model: ServedModel) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Flag."""
    without = {} if not model.lacks("energy") else {"energy": None}
    if model.calibration is None:
        without |= dict.fromkeys(("p_value", "suspicious", "why", "decision", "reasons"))
        told = ("energy", "suspicion", "margin")
        rows = zip(*(getattr(predictions, name).tolist() for name in told), strict=True)
        yield from ({**dict(zip(told, row, strict=True)), **without} for row in rows)
        return
    views, reviewed = model.calibration.views, model.calibration.reviewed
    columns = [getattr(predictions, name).tolist() for name in COLUMNS]
    for values, view, reasons in zip(zip(*columns, strict=True), predictions.why.tolist(), predictions.reasons.tolist(), strict=True):
        flag: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
        if "margin" not in reviewed:
            del flag["margin_p_value"]
        yield {**flag, **without, "why": views[view], **decided(reviewed, reasons)}


def decided(reviewed: Sequence[str], reasons: Sequence[bool]) -> dict[str, Any]:
    """Return the fields of a decision."""
    said = [name for name, hit in zip(reviewed, reasons, strict=True) if hit]
    return {"decision": "review" if said else "accept", "reasons": said}


def checked_answer(checked: Checked, listed: bool, model: ServedModel, alpha: float) -> ClassifyAnswer | ClassifyList:
    """Return the answer of /classify with check=reach to one image, or to a list."""
    assert model.calibration
    columns = zip(checked.reach.tolist(), checked.reach_p_value.tolist(), checked.stable.tolist(), checked.reasons.tolist(), strict=True)
    rows = [
        {**row, **decided([*model.calibration.reviewed, "reach"], reasons), "reach_score": score, "reach_p_value": p, "stable": stable}
        for row, (score, p, stable, reasons) in zip(classified(checked.predictions, model), columns, strict=True)
    ]
    if listed:
        return ClassifyList(results=[Classified(**row) for row in rows], alpha=alpha, model=model.name)
    return ClassifyAnswer(**rows[0], alpha=alpha, model=model.name)


def refuse_not_finite(predictions: Predictions) -> None:
    """Raise Problem 422 for the first image on which the model's logits are not finite, of which nothing can be said."""
    strange = np.flatnonzero(~np.isfinite(predictions.joint_energy).all(axis=1))
    if len(strange):
        index: dict[str, Any] = {"index": int(strange[0])} if len(predictions.joint_energy) > 1 else {}
        which = f"images[{strange[0]}]" if index else "the image"
        raise Problem(422, f"the model's answer on {which} is not finite, so that nothing can be said of it", **index)


def classified(predictions: Predictions, model: ServedModel) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Classified, classes the likeliest first."""
    refuse_not_finite(predictions)
    rows = zip(predictions.top.tolist(), predictions.probability.tolist(), flags(predictions, model), strict=True)
    for classes, probability, flag in rows:
        top = [Candidate(class_=i, label=model.labels[i], probability=probability[i]) for i in classes]
        yield {**vars(top[0]), **flag, "top": top}


def energies(predictions: Predictions, model: ServedModel) -> Iterator[dict[str, Any]]:
    """Yield the fields of each image's Energies."""
    refuse_not_finite(predictions)
    joint_energy = predictions.joint_energy.tolist()
    return ({**flag, "joint_energy": row} for flag, row in zip(flags(predictions, model), joint_energy, strict=True))


def classify_answer(predictions: Predictions, listed: bool, model: ServedModel, alpha: float) -> ClassifyAnswer | ClassifyList:
    """Return the answer of /classify to one image, or to a list."""
    rows = classified(predictions, model)
    if listed:
        return ClassifyList(results=[Classified(**row) for row in rows], alpha=alpha, model=model.name)
    return ClassifyAnswer(**next(rows), alpha=alpha, model=model.name)


def energy_answer(predictions: Predictions, listed: bool, model: ServedModel, alpha: float) -> EnergyAnswer | EnergyList:
    """Return the answer of /energy to one image, or to a list."""
    rows = energies(predictions, model)
    if listed:
        return EnergyList(results=[Energies(**row) for row in rows], alpha=alpha, model=model.name)
    return EnergyAnswer(**next(rows), alpha=alpha, model=model.name)
