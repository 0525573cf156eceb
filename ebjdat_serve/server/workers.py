"""The two worker processes: one batched forward for classify and energy, and chains for generate."""

import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
from numpy.typing import NDArray

from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.engines import Engine, load_engine
from ebjdat_serve.generation import Samples, classify_in_chunks, generate
from ebjdat_serve.server.seam import DrainLoop
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Prior


@dataclass(frozen=True)
class Verdicts:
    """What a worker says of n images: logits-derived arrays with n rows, ready to be written as JSON."""

    probability: NDArray[np.float32]
    joint_energy: NDArray[np.float32]
    energy: NDArray[np.float32]
    p_value: NDArray[np.float64]
    suspicious: NDArray[np.bool_]


@dataclass(frozen=True)
class Job:
    """One request to /generate."""

    label: int
    n: int
    steps: int
    seed: int


@dataclass(frozen=True)
class Drawn:
    """The answer to a Job: pixels (n, H, W, 3) and what the model says of them."""

    image: pixels.Pixels
    verdicts: Verdicts


class Model:
    """An engine with the calibration that turns its outputs into verdicts."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.bundle = Bundle.load(folder)
        calibration = self.bundle.calibration(settings.precision)
        self.bundle.check_precision(settings.precision)
        self.engine: Engine = load_engine(self.bundle, settings.engine, settings.device, settings.threads, settings.precision)
        self.detector = Detector(np.asarray(calibration.energies), settings.alpha)
        self.temperature = calibration.temperature

    def verdicts(self, logits: Any, energy: Any) -> Verdicts:
        """Return what is said of images with these logits (N, K) and energies (N,)."""
        p_value = self.detector.p_value(energy)
        return Verdicts(probabilities(logits, self.temperature), -logits, energy, p_value, self.detector.suspicious(p_value))


class Worker(ls.LitAPI):
    """Opens the model in its own process; the main process alone decides when to stop."""

    model: Model

    def __init__(self, folder: Path, settings: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._folder, self._settings = folder, settings

    def setup(self, device: str) -> None:
        """Load, verify and warm up the model."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.model = Model(self._folder, self._settings)
        m = self.model.bundle.manifest
        self.model.engine.classify(np.zeros((1, 3, m.input.height, m.input.width), np.float32))

    def decode_request(self, request: Any) -> Any:
        """Pass the payload through: it was decoded and validated in the HTTP process."""
        return request

    def batch(self, inputs: list[Any]) -> list[Any]:
        """Leave the requests as they are; predict joins what can be joined."""
        return inputs

    def encode_response(self, output: Any) -> Any:
        """Pass the answer through."""
        return output


class ClassifyWorker(Worker):
    """Requests are uint8 arrays (n, H, W, 3); all that wait share one forward."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings, max_batch_size=settings.max_batch, api_path="/classify", loop=DrainLoop())

    def predict(self, x: list[pixels.Pixels]) -> list[Verdicts]:
        """Return one Verdicts per request."""
        image = pixels.to_unit(np.concatenate(x))
        logits, energy = (np.concatenate(part) for part in zip(*classify_in_chunks(self.model.engine, image), strict=True))
        cuts = np.cumsum([len(one) for one in x])[:-1]
        return [self.model.verdicts(f, e) for f, e in zip(np.split(logits, cuts), np.split(energy, cuts), strict=True)]


class GenerateWorker(Worker):
    """Runs one Job after the other."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings, max_batch_size=1, api_path="/generate", loop=DrainLoop())

    def setup(self, device: str) -> None:
        """Load the model and the prior, and take one step to open the score graph."""
        super().setup(device)
        self.prior = Prior.load(self.model.bundle.path / "prior.safetensors")
        self._draw(Job(label=0, n=1, steps=1, seed=0))

    def predict(self, x: list[Job]) -> list[Drawn]:
        """Return the drawn images of each job."""
        drawn = []
        for job in x:
            samples = self._draw(job)
            drawn.append(Drawn(samples.image, self.model.verdicts(samples.logits, samples.energy)))
        return drawn

    def _draw(self, job: Job) -> Samples:
        sampler = replace(self.model.bundle.manifest.sampler, steps=job.steps)
        return generate(self.model.engine, self.prior, sampler, np.full(job.n, job.label, np.int64), job.seed)
