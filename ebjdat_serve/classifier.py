"""A bundle in this process, without a server: ``ebjdat_serve.load(BUNDLE)``. Decoding, scores, policy and answers are those of HTTP."""

import io
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, overload

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve import selftest
from ebjdat_serve.counterfactual import Norm
from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.engines import Device, EngineKind, Precision
from ebjdat_serve.errors import EbjdatError, InvalidImage, cause, first_line
from ebjdat_serve.manifest import OF_IMAGES
from ebjdat_serve.pixels import Pixels, decode
from ebjdat_serve.reach import RADIUS
from ebjdat_serve.scheduling import Scheduler
from ebjdat_serve.server.answer.explanations import ExplainAnswer, ExplainAnswers
from ebjdat_serve.server.answer.images import GenerateAnswer, GenerateAnswers
from ebjdat_serve.server.answer.predictions import ClassifyAnswer, ClassifyList, checked_answer, classify_answer
from ebjdat_serve.server.compute.check_task import CheckTask
from ebjdat_serve.server.compute.explain_task import ExplainTask
from ebjdat_serve.server.compute.generate_task import ChainTask, GenerateTask
from ebjdat_serve.server.compute.model import Model
from ebjdat_serve.server.payloads import Checked, CheckJob, concatenate
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read import explain_request, generate_request
from ebjdat_serve.server.read.images import limits
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import Check, Settings

if TYPE_CHECKING:
    from PIL import Image

OneImage: TypeAlias = "bytes | bytearray | str | os.PathLike[str] | NDArray[np.uint8] | Image.Image"
"""An encoded image, a file of one, pixels (H, W), (H, W, 3) or (H, W, 4), or a Pillow image."""
Several: TypeAlias = "list[Any] | tuple[OneImage, ...]"
"""A list of images; of any kinds, which a list's type could not say of a list of one kind."""
TOGETHER = 64
"""Images of a list that are decoded and classified together."""
AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's modes that a PNG keeps as they are."""


class Classifier:
    """An open bundle. Methods may be called from several threads: they share one engine, which is opened once and has no state."""

    def __init__(self, path: Path, settings: Settings) -> None:
        """Open the bundle, or the current one of a store, at ``path``: every hash, and the self-test, is checked as a server does it."""
        self._settings = settings
        self._served = open_bundle(path, settings)
        self._model = Model(self._served.bundle.path, settings, ("classify",), self._served.key)
        self._limits, self._lock, self._tested = limits(settings), threading.Lock(), {"classify"}

    @property
    def name(self) -> str:
        """NAME@VERSION, as in answers."""
        return self._served.name

    @property
    def labels(self) -> list[str]:
        """Labels by class index."""
        return list(self._served.labels)

    @overload
    def classify(self, image: OneImage, *, check: Check = ..., radius: float | None = ...) -> ClassifyAnswer: ...
    @overload
    def classify(self, image: Several, *, check: Check = ..., radius: float | None = ...) -> ClassifyList: ...

    def classify(self, image: "OneImage | Several", *, check: Check = "none", radius: float | None = None) -> ClassifyAnswer | ClassifyList:
        """Return what POST /classify answers of an image, or of a list of images.

        Example::

            answer = model.classify("cat.png")
            print(answer.label, answer.probability, answer.suspicious)  # suspicious is None without a calibration

        ``check="reach"`` also tells whether the label is within reach of a small change, within ``radius`` (l-inf, pixels of [0,1]; 2/255).
        Raises InvalidImage, with the place of the image in a list, and EbjdatError for a check that the model cannot do.
        """
        listed = isinstance(image, list | tuple)
        images: Sequence[Any] = image if listed else [image]  # type: ignore[assignment]
        if not images:
            raise EbjdatError("classify was given an empty list")
        if check not in get_args(Check):
            raise EbjdatError(f"check must be {' or '.join(map(repr, get_args(Check)))}, not {check!r}")
        if radius is not None and check != "reach":
            raise EbjdatError("radius is of check='reach', which was not asked for")
        if check == "reach":
            return self._check(self._decoded(images, listed=listed), RADIUS if radius is None else radius, listed=listed)
        starts = range(0, len(images), TOGETHER)
        parts = [self._model.predict(self._decoded(images[i : i + TOGETHER], listed=listed, first=i)) for i in starts]
        answer = self._valid(lambda: classify_answer(concatenate(parts), listed, self._served, self._settings.alpha))
        assert isinstance(answer, ClassifyAnswer | ClassifyList)
        return answer

    def _check(self, image: Pixels, radius: float, *, listed: bool) -> ClassifyAnswer | ClassifyList:
        if self._served.no_check or self._served.calibration is None:
            raise EbjdatError(f"{self.name}: {self._served.no_check}")
        if isinstance(radius, bool) or not isinstance(radius, Real) or not 1e-6 <= radius < 1:
            raise EbjdatError(f"radius must be 1e-6 to 1, not {radius!r:.40}")
        self._ready("score")
        checked: Checked = self._done(CheckTask(self._model, CheckJob(image, radius, self._served.calibration.reach_steps)))
        answer = self._valid(lambda: checked_answer(checked, listed, self._served, self._settings.alpha))
        assert isinstance(answer, ClassifyAnswer | ClassifyList)
        return answer

    def explain(
        self,
        image: OneImage,
        to: str | int | None = None,
        *,
        norm: Norm = "l2",
        radius: float | None = None,
        probability: float = 0.0,
        scale: int = 1,
    ) -> ExplainAnswer:
        """Return what POST /explain?format=json answers: the nearest image, within ``radius``, that the model takes for class ``to``.

        Example::

            answer = model.explain("cat.png", to="dog")
            print(answer.valid, answer.distance.l2)
            Path("dog.png").write_bytes(base64.b64decode(answer.png))

        Without ``to`` it is the runner-up. Raises InvalidImage, and EbjdatError for a model without a gradient and a wrong argument.
        """
        self._able("gradient", "explains")
        given = {"to": None if to is None else str(to), "norm": norm, "radius": radius, "probability": probability, "scale": scale}
        wanted = self._valid(lambda: explain_request.validate_values(given, self._served.bundle.manifest, self._settings))
        job = wanted.job(self._decoded([image], listed=False))
        self._ready("score")
        found = self._done(ExplainTask(self._model, job))
        return ExplainAnswers(self._served, job, scale, self._settings.alpha).document(found)

    def generate(
        self,
        label: str | int,
        n: int = 1,
        seed: int | None = None,
        *,
        steps: int | None = None,
        step_size: float | None = None,
        temperature: float = 1.0,
    ) -> GenerateAnswer:
        """Return what /generate?format=json answers: ``n`` images of class ``label``, image i by ``seed`` + i, at random without a seed.

        Example::

            answer = model.generate("cat", n=4, seed=0)
            Path("cat.png").write_bytes(base64.b64decode(answer.images[0].png))

        Raises EbjdatError for a model that draws nothing and a wrong argument.
        """
        self._able("generate", "draws")
        given: dict[str, Any] = {"class": label, "n": n, "seed": seed, "steps": steps, "step_size": step_size, "temperature": temperature}
        wanted = self._valid(lambda: generate_request.validate({**given, "format": "json"}, self._served.bundle.manifest, self._settings))
        self._ready("step")
        made = self._done(GenerateTask(self._model, wanted.job))
        return GenerateAnswers(self._served, wanted.job, temperature, 1, self._settings.alpha).document(made)

    def _able(self, capability: str, what: str) -> None:
        if reason := self._served.lacks(capability):
            raise EbjdatError(f"{self.name} {what} nothing: {reason}")

    def _ready(self, function: str) -> None:
        """Replay the self-test of a function, once: its graph is opened when it is first needed."""
        with self._lock:
            if function not in self._tested:
                selftest.verify(self._model.bundle, self._model.engine, (function,))
                self._tested.add(function)

    @staticmethod
    def _valid(validate: Any) -> Any:
        """Return a validated request; raise EbjdatError with what HTTP answers for an invalid one."""
        try:
            return validate()
        except Problem as problem:
            raise EbjdatError(problem.detail) from None

    @staticmethod
    def _done(task: ChainTask) -> Any:
        """Return the result of a task, moved as a generate worker moves one that is alone."""
        scheduler = Scheduler()
        scheduler.join(task.group)
        while not task.done:
            for moved in scheduler.advance():
                task.finish(moved.finished)
        return task.result()

    def _decoded(self, images: Sequence[Any], *, listed: bool, first: int = 0) -> Pixels:
        size, decoded = self._served.bundle.manifest.input, []
        for place, image in enumerate(images, first):
            try:
                decoded.append(decode(encoded(image, self._limits), size, self._limits))
            except InvalidImage as error:
                again = InvalidImage(f"images[{place}]: {error}" if listed else str(error), too_large=error.too_large)
                again.index = place if listed else None
                raise again from None
        return np.stack(decoded)


def encoded(image: Any, limits: Limits) -> bytes:
    """Return an image as its bytes: those given, or of a file, or pixels as a PNG. Raises InvalidImage for what is none of them."""
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    if isinstance(image, str | os.PathLike):
        try:
            with open(image, "rb") as file:
                return file.read(limits.max_bytes + 1)  # a longer one is refused by its length
        except (OSError, ValueError) as error:  # the latter of a name that no file can have
            raise InvalidImage(f"{os.fspath(image)!r} cannot be read: {cause(error)}") from None
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))) or not image.size:
            raise InvalidImage(f"an array must be uint8 of (H, W), (H, W, 3) or (H, W, 4), not {image.dtype} of {image.shape}")
        _check_pixels(image.shape[1], image.shape[0], limits)  # before it is copied
        image = Image.fromarray(np.ascontiguousarray(image))
    if not isinstance(image, Image.Image):
        raise InvalidImage(f"an image must be bytes, a path, an array or a Pillow image, not {type(image).__name__}")
    if image.mode == "F":
        raise InvalidImage("an image of floats does not say what is white: give uint8")
    _check_pixels(image.width, image.height, limits)  # before it is encoded
    try:
        if image.mode == "I":
            image = image.convert("I;16")
        if image.mode not in AS_PNG:
            image = image.convert("RGBA" if image.mode in ("RGBa", "La", "PA") else "RGB")
        buffer, exif = io.BytesIO(), image.getexif()
        image.save(buffer, "PNG", compress_level=1, **({"exif": exif} if exif else {}))
    except (OSError, ValueError) as error:  # closed, truncated, without pixels
        raise InvalidImage(f"Pillow does not give the image's pixels: {first_line(error)}") from None
    return buffer.getvalue()


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.max_pixels:
        raise InvalidImage(f"the image has {width} x {height} pixels; the limit is {limits.max_pixels} in all", too_large=True)


def load(
    path: str | os.PathLike[str],
    *,
    engine: EngineKind = "auto",
    device: Device = "auto",
    precision: Precision = "fp32",
    calibration: str = OF_IMAGES,
    alpha: float = 0.05,
    threads: int | None = None,
    trust: Sequence[str | os.PathLike[str]] = (),
) -> Classifier:
    """Open a bundle or the current one of a store, as `ebjdat-serve serve` does with the options of the same names.

    Raises BundleError for one that cannot be served, EbjdatError for an option, TypeError for a path that is none.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"load takes the path of a bundle or a store, a str or a Path, not {path!r:.40}")
    if isinstance(trust, str | bytes | os.PathLike):
        raise TypeError(f"trust takes a list of paths of public keys, not {trust!r:.40}: [{trust!r:.40}]")
    keys = tuple(map(Path, trust))
    settings = Settings(Path(path), engine=engine, device=device, precision=precision, calibration=calibration, alpha=alpha, trust=keys)
    return Classifier(settings.model, settings if threads is None else replace(settings, threads=threads))
