"""How answers are worded: what workers say of images, as JSON, as PNG, as server-sent events."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import Response
from fastapi.responses import JSONResponse

from ebjdat_serve import __version__, pixels
from ebjdat_serve.server.answer.schemas import GenerateQuery
from ebjdat_serve.server.ipc import Drawn, Job, Preview, Verdicts
from ebjdat_serve.server.model_manager import Served

TOP = 5


@dataclass(frozen=True)
class Words:
    """The words of one served bundle: every answer names the model that made it, and its labels are that model's."""

    served: Served
    alpha: float

    @property
    def names(self) -> list[str]:
        """Labels by class index."""
        return self.served.bundle.manifest.labels

    def answer(self, rows: list[dict[str, Any]], listed: bool) -> JSONResponse:
        """Return one row as it is, or a list."""
        tail = {"alpha": self.alpha, "model": self.served.name}
        return JSONResponse({"results": rows, **tail} if listed else {**rows[0], **tail})

    def candidate(self, label: int, probability: float) -> dict[str, Any]:
        """Return one class and its probability."""
        return {"class": label, "label": self.names[label], "probability": probability}

    def flags(self, verdicts: Verdicts) -> list[dict[str, Any]]:
        """Return each image's energy and what follows from it."""
        names = ("energy", "suspicion", "p_value", "suspicious")
        columns = (getattr(verdicts, name).tolist() for name in names)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def classified(self, verdicts: Verdicts) -> list[dict[str, Any]]:
        """Return what /classify says of each image."""
        order = np.argsort(-verdicts.probability, axis=1, kind="stable")[:, :TOP]
        probability = np.take_along_axis(verdicts.probability, order, axis=1).tolist()
        tops = [
            [self.candidate(label, p) for label, p in zip(*pair, strict=True)] for pair in zip(order.tolist(), probability, strict=True)
        ]
        return [{**top[0], **flag, "top": top} for top, flag in zip(tops, self.flags(verdicts), strict=True)]

    def energies(self, verdicts: Verdicts) -> list[dict[str, Any]]:
        """Return what /energy says of each image."""
        joint = verdicts.joint_energy.tolist()
        return [{**flag, "joint_energy": energies} for flag, energies in zip(self.flags(verdicts), joint, strict=True)]


@dataclass(frozen=True)
class Order:
    """A validated request to /generate."""

    words: Words
    query: GenerateQuery
    job: Job

    def drawn(self, drawn: Drawn) -> Response:
        """Return the images as they were asked for."""
        return JSONResponse(self.document(drawn)) if self.query.format == "json" else self.sheet(drawn)

    def document(self, drawn: Drawn) -> dict[str, Any]:
        """Return what format=json answers."""
        job, words, flags = self.job, self.words, self.words.flags(drawn.verdicts)
        probability = drawn.verdicts.probability[:, job.label].tolist()
        rows = [
            {
                **words.candidate(job.label, probability[i]),
                **flags[i],
                "seed": job.seed + i,
                "png": self._base64(image, [job.seed + i]),
            }
            for i, image in enumerate(drawn.image)
        ]
        sampler = {"steps": job.sampler.steps, "step_size": job.sampler.step_size, "temperature": self.query.temperature}
        return {"images": rows, **sampler, "sampler": "short-run SGLD", "alpha": words.alpha, "model": words.served.name}

    def sheet(self, drawn: Drawn) -> Response:
        """Return a PNG, a grid of all images; what is said of them is in its headers."""
        job, v = self.job, drawn.verdicts

        def listed(values: Any) -> str:
            return ",".join(f"{float(value):.6g}" for value in values)

        headers = {
            "X-Class": str(job.label),
            "X-Label": quote(self.words.names[job.label]),
            "X-Seed": str(job.seed),
            "X-Steps": str(job.sampler.steps),
            "X-Step-Size": f"{job.sampler.step_size:g}",
            "X-Temperature": f"{self.query.temperature:g}",
            "X-Energy": listed(v.energy),
            "X-Probability": listed(v.probability[:, job.label]),
            "X-P-Value": listed(v.p_value),
            "X-Model": quote(self.words.served.name, safe="@-._"),
            "X-Content-Origin": "ai-generated",
        }
        sheet = self._png(pixels.grid(drawn.image, self.query.scale), self._seeds())
        return Response(sheet, media_type="image/png", headers=headers)

    def done(self, drawn: Drawn) -> bytes:
        """Return the last event of a stream."""
        return event("done", self.document(drawn))

    def preview(self, preview: Preview) -> bytes:
        """Return the event that shows how far the chains have come."""
        v = preview.verdicts
        document = {
            "step": preview.step,
            "steps": self.job.sampler.steps,
            "energy": v.energy.tolist(),
            "probability": v.probability[:, self.job.label].tolist(),
            "png": self._base64(pixels.grid(preview.image, self.query.scale), self._seeds()),
            "model": self.words.served.name,
        }
        return event("preview", document)

    def _seeds(self) -> list[int]:
        return list(range(self.job.seed, self.job.seed + self.job.n))

    def _base64(self, image: pixels.Pixels, seeds: Sequence[int]) -> str:
        return base64.b64encode(self._png(image, seeds)).decode()

    def _png(self, image: pixels.Pixels, seeds: Sequence[int]) -> bytes:
        job, name = self.job, self.words.names[self.job.label]
        made = f"class {job.label} ({name}), model {self.words.served.name}, seeds {seeds[0]}..{seeds[-1]}, {job.sampler.steps} steps"
        text = [
            ("Software", f"ebjdat_serve {__version__}"),
            ("Source", "AI-generated: conditional SGLD on an energy-based model"),
            ("Description", made),
        ]
        return pixels.encode_png(image, text, generated=True)


def event(kind: str, document: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(document)}\n\n".encode()
