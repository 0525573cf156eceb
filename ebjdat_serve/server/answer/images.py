"""Answers of /generate: images as PNG, as JSON, or as server-sent events."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import quote

from pydantic import Field

from ebjdat_serve import __version__, pixels
from ebjdat_serve.server.answer import Schema
from ebjdat_serve.server.answer.predictions import Candidate, Flag, flags
from ebjdat_serve.server.payloads import GeneratedImages, GenerateJob, GeneratePreview
from ebjdat_serve.server.served_model import ServedModel


class Generated(Flag, Candidate):
    """One generated image; ``class``, ``label`` and ``probability`` are of the class asked for."""

    seed: int
    png: Annotated[str, Field(description="base64 PNG")]


class GenerateAnswer(Schema):
    """Answer of /generate with format=json."""

    images: list[Generated]
    steps: int
    step_size: float
    temperature: float
    sampler: str
    alpha: float
    model: str


class GeneratePreviewEvent(Schema):
    """Data of a preview event of /generate with stream=true: energies and probabilities by image, and a PNG of all images."""

    step: int
    steps: int
    energy: list[float]
    probability: list[float]
    png: Annotated[str, Field(description="base64 PNG")]
    model: str


class PngHeaders(Schema):
    """Headers of /generate with format=png; lists are comma-separated, one value per image."""

    class_: Annotated[str, Field(alias="X-Class", description="class index")]
    label: Annotated[str, Field(alias="X-Label", description="percent-encoded")]
    seed: Annotated[str, Field(alias="X-Seed", description="of the first image; image i has the seed + i")]
    steps: Annotated[str, Field(alias="X-Steps")]
    step_size: Annotated[str, Field(alias="X-Step-Size")]
    temperature: Annotated[str, Field(alias="X-Temperature")]
    energy: Annotated[str, Field(alias="X-Energy")]
    probability: Annotated[str, Field(alias="X-Probability")]
    p_value: Annotated[str | None, Field(alias="X-P-Value", description="absent where the model is not calibrated")] = None
    model: Annotated[str, Field(alias="X-Model", description="percent-encoded")]
    content_origin: Annotated[str, Field(alias="X-Content-Origin")] = "ai-generated"


@dataclass(frozen=True)
class GenerateAnswers:
    """Makes the answers to one request to /generate."""

    model: ServedModel
    job: GenerateJob
    temperature: float
    scale: int
    alpha: float

    @property
    def label(self) -> str:
        """The name of the class asked for."""
        return self.model.labels[self.job.label]

    def document(self, result: GeneratedImages) -> GenerateAnswer:
        """Return the answer with format=json, also the data of the last event of a stream."""
        job = self.job
        probability = result.predictions.probability[:, job.label].tolist()
        rows = zip(result.image, probability, flags(result.predictions, self.model), range(job.seed, job.seed + job.n), strict=True)
        images = [
            Generated(class_=job.label, label=self.label, probability=p, **flag, seed=seed, png=self._base64(image, [seed]))
            for image, p, flag, seed in rows
        ]
        return GenerateAnswer(
            images=images,
            steps=job.sampler.steps,
            step_size=job.sampler.step_size,
            temperature=self.temperature,
            sampler="short-run SGLD",
            alpha=self.alpha,
            model=self.model.name,
        )

    def sheet(self, result: GeneratedImages) -> tuple[bytes, PngHeaders]:
        """Return the answer with format=png: a grid of all images, and its headers with the predictions for them."""
        job, predictions = self.job, result.predictions
        headers = PngHeaders(
            class_=str(job.label),
            label=quote(self.label),
            seed=str(job.seed),
            steps=str(job.sampler.steps),
            step_size=f"{job.sampler.step_size:g}",
            temperature=f"{self.temperature:g}",
            energy=comma_separated(predictions.energy),
            probability=comma_separated(predictions.probability[:, job.label]),
            p_value=comma_separated(predictions.p_value) if self.model.calibration else None,
            model=quote(self.model.name, safe="@-._"),
        )
        return self._png(pixels.grid(result.image, self.scale), self._seeds()), headers

    def preview(self, preview: GeneratePreview) -> GeneratePreviewEvent:
        """Return the data of a preview event."""
        return GeneratePreviewEvent(
            step=preview.step,
            steps=self.job.sampler.steps,
            energy=preview.predictions.energy.tolist(),
            probability=preview.predictions.probability[:, self.job.label].tolist(),
            png=self._base64(pixels.grid(preview.image, self.scale), self._seeds()),
            model=self.model.name,
        )

    def _seeds(self) -> Sequence[int]:
        return range(self.job.seed, self.job.seed + self.job.n)

    def _base64(self, image: pixels.Pixels, seeds: Sequence[int]) -> str:
        return base64.b64encode(self._png(image, seeds)).decode()

    def _png(self, image: pixels.Pixels, seeds: Sequence[int]) -> bytes:
        job = self.job
        made = f"class {job.label} ({self.label}), model {self.model.name}, seeds {seeds[0]}..{seeds[-1]}, {job.sampler.steps} steps"
        text = [
            ("Software", f"ebjdat_serve {__version__}"),
            ("Source", "AI-generated: conditional SGLD on an energy-based model"),
            ("Description", made),
        ]
        return pixels.encode_png(image, text, generated=True)


def comma_separated(values: Iterable[float]) -> str:
    """Return numbers as a header has them."""
    return ",".join(f"{float(value):.6g}" for value in values)


def event(kind: str, data: str) -> bytes:
    """Return one server-sent event; ``data`` is JSON on one line."""
    return f"event: {kind}\ndata: {data}\n\n".encode()
