"""The two kinds of worker process: one batched forward for classify and energy, and chains for generate."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
from litserve.loops import LitLoop

from ebjdat_serve import logs, pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.engines import Engine, load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.generation import classify_in_chunks
from ebjdat_serve.scheduling import Policy, Request, Scheduler
from ebjdat_serve.scores import ood_score
from ebjdat_serve.selftest import verify
from ebjdat_serve.server import ipc
from ebjdat_serve.server.compute.memory import give_back_large_blocks
from ebjdat_serve.server.ipc import (
    Answer,
    Ask,
    Cancel,
    Drawn,
    Drop,
    Hello,
    Job,
    Line,
    Load,
    Loaded,
    Pace,
    Preview,
    Refused,
    Show,
    Verdicts,
)
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Chains, Prior

log = logging.getLogger("ebjdat_serve")
PACE = 0.25
"""Seconds between two reports of how fast chains move."""
MEMORY = 3.0
"""Seconds over which that is a mean."""


class Model:
    """An engine with the calibration that turns its outputs into verdicts."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.bundle = Bundle.load(folder)
        calibration = self.bundle.calibration(settings.precision)
        self.bundle.check_precision(settings.precision)
        self.engine: Engine = load_engine(self.bundle, settings.engine, settings.device, settings.threads, settings.precision)
        self.detector = Detector(np.asarray(calibration.scores), settings.alpha)
        self.calibration = calibration
        self.prior = Prior.load(self.bundle.path / "prior.safetensors")

    def about(self) -> dict[str, str]:
        """Return what runs the model."""
        return {"engine": self.engine.name, "provider": self.engine.provider, "precision": self.engine.precision}

    def verdicts(self, image: pixels.Pixels) -> Verdicts:
        """Return what the model says of pixels (n, H, W, 3)."""
        parts = classify_in_chunks(self.engine, pixels.to_unit(image))
        logits, energy = (np.concatenate(part) for part in zip(*parts, strict=True))
        suspicious = ood_score(self.calibration.score, self.calibration.weight, logits)
        p_value = self.detector.p_value(suspicious)
        p = probabilities(logits, self.calibration.temperature)
        return Verdicts(p, -logits, energy, suspicious, p_value, self.detector.suspicious(p_value))


class Worker(ls.LitAPI):
    """What LitServe starts, watches and starts again; its loop is `Talk`, and models are opened when the HTTP process says so."""

    lane: str
    functions: tuple[str, ...]

    def __init__(self, address: str, settings: Settings) -> None:
        super().__init__(api_path=f"/{self.lane}", loop=Talk())
        self._address, self._settings = address, settings

    def setup(self, device: str) -> None:
        """Leave it to the main process alone to decide when to stop: a signal to the whole group must not cut off what is being drained."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        give_back_large_blocks()
        logs.configure(self._settings.log)
        with contextlib.suppress(OSError):  # no Linux
            Path("/proc/self/comm").write_text(f"ebjdat-{self.lane}", encoding="ascii")  # for ps and top

    def work(self) -> None:
        """Serve until the HTTP process hangs up."""
        self.models: dict[str, Model] = {}
        self._opening: list[threading.Thread] = []
        self.line = Line(self._address)
        self.line.send(Hello(self.lane, os.getpid()))
        try:
            while True:
                self.turn()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            log.debug("the HTTP process has gone, and so does its worker")
            if any(thread.is_alive() for thread in self._opening):
                os._exit(0)  # an engine that is cut off in the middle of opening a graph would abort, with words of its own

    @abstractmethod
    def turn(self) -> None:
        """Do one piece of work, or wait for it."""

    def heed(self, message: Any) -> None:
        """Open or forget a model."""
        match message:
            case Load():
                # beside the work, which goes on with the models that are open
                opening = threading.Thread(target=self._load, args=(message,), daemon=True)
                self._opening = [thread for thread in self._opening if thread.is_alive()] + [opening]
                opening.start()
            case Drop(key):
                self.models.pop(key, None)

    def _load(self, wanted: Load) -> None:
        try:
            model = Model(wanted.folder, self._settings)
            if model.bundle.served != wanted.key:
                raise BundleError(f"{wanted.folder} is not the bundle that was verified; publish a change as a new version")
            verify(model.bundle, model.engine, self.functions)
            self.prepare(model)
        except EbjdatError as error:
            answer: object = Refused(wanted.key, error.advised())
        except Exception as error:
            log.exception("cannot open %s", wanted.folder)
            answer = Refused(wanted.key, f"{wanted.folder} cannot be opened: {type(error).__name__}: {error}")
        else:
            self.models[wanted.key] = model
            answer = Loaded(wanted.key, model.about())
        self.line.send(answer)

    def prepare(self, model: Model) -> None:
        """Do what must be done before the first request."""
        model.verdicts(np.zeros((1, model.bundle.manifest.input.height, model.bundle.manifest.input.width, 3), np.uint8))

    # LitServe asks for these of every LitAPI; with a loop of our own they are never called

    def decode_request(self, request: Any) -> Any:
        """Return the request."""
        return request

    def predict(self, x: Any) -> Any:
        """Return the input."""
        return x

    def encode_response(self, output: Any) -> Any:
        """Return the output."""
        return output


class Talk(LitLoop):
    """LitServe's public hook for a loop of one's own: it hands over to the worker."""

    def __call__(self, lit_api: Worker, *_: Any) -> None:
        """Serve until the HTTP process hangs up."""
        lit_api.work()


class ClassifyWorker(Worker):
    """One message is one batch: uint8 pixels (n, H, W, 3)."""

    lane = "classify"
    functions = ("classify",)

    def turn(self) -> None:
        """Answer one message."""
        message = self.line.receive()
        if isinstance(message, Ask):
            self.line.send(Answer(message.number, self.models[message.key].verdicts(message.payload)))
        else:
            self.heed(message)


class GenerateWorker(Worker):
    """Moves the chains of all its jobs, a turn at a time, and listens between two turns."""

    lane = "generate"
    functions = ("classify", "step")

    def work(self) -> None:
        """Serve until the HTTP process hangs up."""
        self.scheduler = Scheduler()
        self.drawings: dict[int, Drawing] = {}
        self.drawn: dict[Request, Drawing] = {}
        self.rate, self.taken, self.since = 0.0, 0, time.monotonic()
        super().work()

    def prepare(self, model: Model) -> None:
        """Time a step or two: admission needs to know how fast chains move."""
        super().prepare(model)
        n = min(Policy.of(model.engine).width, 16)
        chains = Chains.start(model.prior, model.bundle.manifest.sampler, np.zeros(n, np.int64), seed=0)
        model.engine.advance(chains, 1)
        began = time.perf_counter()
        model.engine.advance(chains, 2)
        if not self.rate:
            self.rate = 2 * n / (time.perf_counter() - began)
            self.line.send(Pace(self.rate, {}))

    def turn(self) -> None:
        """Hear what there is to hear, then move chains once."""
        while self.line.waiting(0.0 if self.scheduler.requests else None):
            self._hear(self.line.receive())
        if not self.scheduler.requests:
            return
        for moved in self.scheduler.advance():
            self.taken += moved.steps * len(moved.rows)
            drawing = self.drawn[moved.request]
            drawing.arrive(moved.arrived)
            if drawing.done:
                self._forget(drawing)
                self.line.send(Answer(drawing.number, drawing.result()))
            elif drawing.preview_is_due():
                self.line.send(drawing.preview())
        if (elapsed := time.monotonic() - self.since) > PACE:
            share = 1 - math.exp(-elapsed / MEMORY)  # what a window of a quarter second says alone swings too much
            self.rate += share * (self.taken / elapsed - self.rate)
            self.taken, self.since = 0, time.monotonic()
            self._tell()

    def _hear(self, message: Any) -> None:
        match message:
            case Ask(number, key, job):
                if not self.scheduler.requests:
                    self.taken, self.since = 0, time.monotonic()  # time spent asleep is not slowness
                drawing = Drawing(number, job, self.models[key])
                self.drawings[number] = self.drawn[drawing.request] = drawing
                self.scheduler.join(drawing.request)
            case Cancel(number) if number in self.drawings:  # it may have been answered meanwhile
                self.scheduler.leave(self.drawings[number].request)
                self._forget(self.drawings[number])
            case Show(number) if number in self.drawings:
                self.drawings[number].may_show = True
            case _:
                self.heed(message)

    def _forget(self, drawing: "Drawing") -> None:
        del self.drawings[drawing.number], self.drawn[drawing.request]

    def _tell(self) -> None:
        left = {drawing.number: drawing.request.left for drawing in self.drawings.values()}
        self.line.send(Pace(self.rate, left, self.scheduler.longest))
        self.scheduler.longest = 0.0


class Drawing:
    """A job on its way: its chains, and the images of those that arrived."""

    def __init__(self, number: int, job: Job, model: Model) -> None:
        self.number, self._job, self._model = number, job, model
        self.may_show = True
        chains = Chains.start(model.prior, job.sampler, np.full(job.n, job.label, np.int64), job.seed)
        self.request = Request(model.engine, chains, job.sampler.steps)
        self._image = np.zeros((job.n, *chains.image.shape[2:], 3), np.uint8)
        self._said: dict[int, Verdicts] = {}
        self._shown = 0

    def arrive(self, rows: Any) -> None:
        """Turn chains that took their last step into pixels, and ask the model about exactly those."""
        if len(rows):
            self._image[rows] = pixels.to_bytes(self.request.chains.image[rows])
            said = self._model.verdicts(self._image[rows])
            self._said |= {int(row): said.rows(slice(i, i + 1)) for i, row in enumerate(rows)}

    @property
    def done(self) -> bool:
        """Whether every chain has arrived."""
        return len(self._said) == self._job.n

    def result(self) -> Drawn:
        """Return the images and what the model says of them."""
        return Drawn(self._image, ipc.joined([self._said[row] for row in range(self._job.n)]))

    def preview_is_due(self) -> bool:
        """Return whether the client has taken the last preview, and the slowest chain has come ``every`` steps further."""
        if not self._job.every or not self.may_show:
            return False
        step = int(self.request.chains.step.min())
        return step - self._shown >= self._job.every

    def preview(self) -> Preview:
        """Return how the chains look now."""
        self._shown, self.may_show = int(self.request.chains.step.min()), False
        image = pixels.to_bytes(self.request.chains.image)
        return Preview(self.number, self._shown, image, self._model.verdicts(image))
