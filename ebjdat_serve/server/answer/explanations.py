"""Answers of /explain: a strip of input, counterfactual and difference as PNG, as JSON, or as server-sent events."""

import base64
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import quote

import numpy as np
from pydantic import Field

from ebjdat_serve import __version__, pixels
from ebjdat_serve.counterfactual import STEPS, Norm
from ebjdat_serve.server.answer import Attributed, Schema
from ebjdat_serve.server.answer.predictions import Candidate, Classified, classified
from ebjdat_serve.server.payloads import ExplainJob, Explanation
from ebjdat_serve.server.served_model import ServedModel

ORIGIN = "AI-generated: a counterfactual, the input changed until the model takes it for another class"


class Distances(Schema):
    """How far an image is from the input: norms of the difference in pixel units of [0,1]."""

    l1: float
    l2: float
    linf: float


class Tried(Schema):
    """One image that the search tried: in the ascent, or in the bisection between the input and the first that was found."""

    step: int
    phase: Literal["input", "ascent", "bisection"]
    probability: Annotated[float, Field(description="of the class asked for")]
    probability_input: Annotated[float, Field(description="of the input's class")]
    l2: float
    linf: float


class Search(Schema):
    """What was looked for, and how far the nearest image of it is."""

    valid: Annotated[
        bool, Field(description="the model takes the counterfactual for the class asked for, within the radius; else it is the last tried")
    ]
    to: Annotated[Candidate, Field(description="the class asked for, and its probability in the counterfactual")]
    distance: Distances


class ExplainAnswer(Attributed, Search):
    """Answer of /explain with format=json."""

    input: Classified
    counterfactual: Classified
    norm: Norm
    radius: float
    path: list[Tried]
    png: Annotated[str, Field(description="base64 PNG: the counterfactual")]
    strip: Annotated[str, Field(description="base64 PNG: input, counterfactual, signed difference")]
    difference_scale: Annotated[float, Field(description="what the difference is multiplied by in the strip; mid-grey is none")]


class ExplainPreviewEvent(Search):
    """Data of a preview event of /explain with stream=true: the nearest image of the class so far, or the last tried."""

    step: int
    strip: Annotated[str, Field(description="base64 PNG: input, counterfactual, signed difference")]
    model: str


class StripHeaders(Schema):
    """Headers of /explain with format=png."""

    class_: Annotated[str, Field(alias="X-Class", description="class index of the input")]
    label: Annotated[str, Field(alias="X-Label", description="percent-encoded")]
    to_class: Annotated[str, Field(alias="X-To-Class", description="class index asked for")]
    to_label: Annotated[str, Field(alias="X-To-Label", description="percent-encoded")]
    valid: Annotated[str, Field(alias="X-Valid", description="true or false")]
    probability: Annotated[str, Field(alias="X-Probability", description="of the class asked for, in the counterfactual")]
    l2: Annotated[str, Field(alias="X-L2")]
    linf: Annotated[str, Field(alias="X-Linf")]
    difference_scale: Annotated[str, Field(alias="X-Difference-Scale")]
    model: Annotated[str, Field(alias="X-Model", description="percent-encoded")]
    content_origin: Annotated[str, Field(alias="X-Content-Origin")] = "ai-generated"


@dataclass(frozen=True)
class ExplainAnswers:
    """Makes the answers to one request to /explain."""

    model: ServedModel
    job: ExplainJob
    scale: int
    alpha: float

    def document(self, found: Explanation) -> ExplainAnswer:
        """Return the answer with format=json, also the data of the last event of a stream."""
        before, after = classified(found.predictions, self.model)
        _, scale = difference(found)
        return ExplainAnswer(
            **self._search(found),
            input=Classified(**before),
            counterfactual=Classified(**after),
            norm=self.job.norm,
            radius=self.job.radius,
            path=list(tried(found)),
            png=self._base64(found.image[1], found),
            strip=self._base64(self._strip(found), found),
            difference_scale=scale,
            alpha=self.alpha,
            model=self.model.name,
        )

    def sheet(self, found: Explanation) -> tuple[bytes, StripHeaders]:
        """Return the answer with format=png, and its headers."""
        said, top = self._search(found), int(found.predictions.top[0, 0])
        _, scale = difference(found)
        headers = StripHeaders(
            class_=str(top),
            label=quote(self.model.labels[top]),
            to_class=str(found.target),
            to_label=quote(self.model.labels[found.target]),
            valid=str(found.valid).lower(),
            probability=f"{said['to'].probability:.6g}",
            l2=f"{said['distance'].l2:.6g}",
            linf=f"{said['distance'].linf:.6g}",
            difference_scale=f"{scale:.6g}",
            model=quote(self.model.name, safe="@-._"),
        )
        return self._png(self._strip(found), found), headers

    def preview(self, found: Explanation) -> ExplainPreviewEvent:
        """Return the data of a preview event."""
        strip = self._base64(self._strip(found), found)
        return ExplainPreviewEvent(**self._search(found), step=found.step, strip=strip, model=self.model.name)

    def _search(self, found: Explanation) -> dict[str, Any]:
        target = found.target
        probability = float(found.predictions.probability[1, target])
        to = Candidate(class_=target, label=self.model.labels[target], probability=probability)
        return {"valid": found.valid, "to": to, "distance": distances(found)}

    def _strip(self, found: Explanation) -> pixels.Pixels:
        return pixels.grid(np.concatenate([found.image, difference(found)[0][np.newaxis]]), self.scale, columns=3)

    def _base64(self, image: pixels.Pixels, found: Explanation) -> str:
        return base64.b64encode(self._png(image, found)).decode()

    def _png(self, image: pixels.Pixels, found: Explanation) -> bytes:
        made = f"to class {found.target} ({self.model.labels[found.target]}), model {self.model.name}, valid {str(found.valid).lower()}"
        text = [("Software", f"ebjdat_serve {__version__}"), ("Source", ORIGIN), ("Description", made)]
        return pixels.encode_png(image, text, generated=True)


def difference(found: Explanation) -> tuple[pixels.Pixels, float]:
    """Return counterfactual - input as pixels around mid-grey, and what it is multiplied by: its largest becomes black or white."""
    delta = found.image[1].astype(np.float64) - found.image[0]
    scale = 127.0 / max(1.0, float(np.abs(delta).max()))
    return np.rint(128 + scale * delta).astype(np.uint8), scale


def distances(found: Explanation) -> Distances:
    """Return how far the counterfactual is from the input."""
    delta = np.abs(found.image[1].astype(np.float64) - found.image[0]).ravel() / 255
    return Distances(l1=float(delta.sum()), l2=float(np.linalg.norm(delta)), linf=float(delta.max()))


def tried(found: Explanation) -> list[Tried]:
    """Return what the search tried, in order."""
    names = ("probability", "probability_input", "l2", "linf")
    return [
        Tried(step=step, phase="input" if not step else "ascent" if step <= STEPS else "bisection", **dict(zip(names, row, strict=True)))
        for step, row in enumerate(found.path.tolist())
        if not np.isnan(row[0])
    ]
