"""The two kinds of worker process: one runs a forward pass per batch, the other moves the chains of all its jobs."""

import contextlib
import logging
import math
import os
import signal
import socket
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import litserve as ls
import numpy as np
from litserve.loops import LitLoop

from ebjdat_serve import logs
from ebjdat_serve.bundle import Bundle, draws
from ebjdat_serve.engines import on_cpu
from ebjdat_serve.errors import EbjdatError, first_line
from ebjdat_serve.generation import chunk_size
from ebjdat_serve.scheduling import Group, Policy, Scheduler
from ebjdat_serve.server import ipc
from ebjdat_serve.server.compute.generate_task import ChainTask
from ebjdat_serve.server.compute.model import Model, Operation
from ebjdat_serve.server.line_log import log_by_thread
from ebjdat_serve.server.memory import return_large_blocks
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Chains

log = logging.getLogger("ebjdat_serve")
STATS_SECONDS = 0.25
"""Seconds between two reports of the rate of chain-steps."""
RATE_WINDOW = 3.0
"""Time constant of the rate's moving average, in seconds."""


class Worker(ls.LitAPI):
    """A process that LitServe starts and restarts; its loop is WorkerLoop, and the HTTP process tells it which bundles to open."""

    kind: ipc.Kind
    functions: tuple[str, ...]  # of the engine, which the self-test covers

    def __init__(self, model: str, settings: Settings, operations: Sequence[Operation]) -> None:
        super().__init__(api_path=f"/{model}/{self.kind}", loop=WorkerLoop())
        self.model = model
        self.connection: socket.socket | None = None  # to the HTTP process; the main process sets it as it starts this one
        self._settings = settings
        self.operations = {operation.name: operation.run for operation in operations if operation.kind == self.kind}

    def setup(self, device: str) -> None:
        """Prepare the process; signals are ignored, since one to the whole process group must not cut off what the main process drains."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        return_large_blocks()
        logs.configure(self._settings.log)
        log_by_thread()  # LitServe spawns it: nothing of the main process's log came along
        with contextlib.suppress(OSError):  # no Linux
            Path("/proc/self/comm").write_text(f"ebjdat-{self.kind}", encoding="ascii")  # for ps and top

    def work(self) -> None:
        """Serve until the HTTP process closes the connection."""
        self.models: dict[str, Model] = {}
        self._loading: list[threading.Thread] = []
        assert self.connection
        self.channel = ipc.Channel(self.connection)
        self.channel.send(ipc.Hello(self.model, self.kind, os.getpid()))
        try:
            while True:
                self.turn()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            log.debug("the HTTP process has gone, and so does its worker")
            if any(thread.is_alive() for thread in self._loading):
                os._exit(0)  # an engine that is interrupted while it opens a graph would abort, with a message of its own

    @abstractmethod
    def turn(self) -> None:
        """Do one piece of work, or wait for it."""

    def handle(self, message: Any) -> None:
        """Open or close a model, or refuse a request for an operation that this worker does not have."""
        match message:
            case ipc.LoadModel():
                # in a thread: requests for the models that are open go on
                loading = threading.Thread(target=self._load, args=(message,), daemon=True)
                self._loading = [thread for thread in self._loading if thread.is_alive()] + [loading]
                loading.start()
            case ipc.UnloadModel(key):
                self.models.pop(key, None)
            case ipc.Request(number, _, operation):
                log.error("no endpoint lists the operation %r among its operations", operation)
                self.channel.send(ipc.UnknownOperation(number, operation))

    def _load(self, wanted: ipc.LoadModel) -> None:
        try:
            if not self.needed(Bundle.draft(wanted.folder)):
                self.channel.send(ipc.ModelLoaded(wanted.key, {"engine": "none"}))
                return
            model = Model(wanted.folder, self._settings, self.functions, wanted.key)
            self.warm_up(model)
        except EbjdatError as error:
            answer: object = ipc.ModelRefused(wanted.key, error.advised())
        except Exception as error:
            log.exception("cannot open %s", wanted.folder)
            answer = ipc.ModelRefused(wanted.key, f"{wanted.folder} cannot be opened: {type(error).__name__}: {error}")
        else:
            self.models[wanted.key] = model
            answer = ipc.ModelLoaded(wanted.key, model.engine_info())
        self.channel.send(answer)

    def needed(self, bundle: Bundle) -> bool:
        """Return whether requests for the bundle can come to this worker; if not, it opens nothing, and takes no memory for it."""
        return True

    def warm_up(self, model: Model) -> None:
        """Run the model before the first request, on a GPU in every batch size: each opens a session, or captures a graph."""
        size, engine = model.bundle.manifest.input, model.engine
        sizes = engine.sizes(chunk_size(engine, size.height, size.width))
        prepare(sizes, lambda n: model.predict(np.zeros((n, size.height, size.width, 3), np.uint8)))

    # LitServe requires these methods of every LitAPI; with a loop of our own they are never called

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, x: Any) -> Any:
        return x

    def encode_response(self, output: Any) -> Any:
        return output


class WorkerLoop(LitLoop):
    """LitServe's public hook for a custom loop: runs the worker's own."""

    def __call__(self, lit_api: Worker, *_: Any) -> None:
        """Serve until the HTTP process closes the connection."""
        lit_api.work()


class ClassifyWorker(Worker):
    """Each request is one batch."""

    kind = "classify"
    functions = ("classify",)

    def turn(self) -> None:
        """Receive one message and answer it."""
        self.handle(self.channel.receive())

    def handle(self, message: Any) -> None:
        """Run an operation on a batch."""
        match message:
            case ipc.Request(number, key, operation, payload) if operation in self.operations:
                began = time.perf_counter()
                images = np.concatenate(payload) if isinstance(payload, list) else payload
                value = self.operations[operation](self.models[key], images)
                self.channel.send(ipc.Response(number, value, time.perf_counter() - began))
            case _:
                super().handle(message)


class GenerateWorker(Worker):
    """Moves the chains of all its tasks, a turn at a time, and receives messages between two turns."""

    kind = "generate"
    functions = ("classify", "score", "step")

    def work(self) -> None:
        """Serve until the HTTP process closes the connection."""
        self.scheduler = Scheduler()
        self.tasks: dict[int, ChainTask] = {}
        self.since: dict[int, float] = {}  # when each began
        self.numbers: dict[Group[Any], int] = {}
        self.rate, self.steps_taken, self.rate_since = 0.0, 0, time.monotonic()
        super().work()

    def needed(self, bundle: Bundle) -> bool:
        return draws(bundle)

    def warm_up(self, model: Model) -> None:
        """Time a few steps too, or gradients where there are no steps: admission needs the rate of chain-steps."""
        super().warm_up(model)
        width = Policy.of(model.engine).width
        if not on_cpu(model.engine):
            prepare(model.engine.sizes(width), lambda n: [run() for run in runs(model, n)])
        n = min(width, 16)
        step = runs(model, n)[0]
        step()
        began = time.perf_counter()
        step()
        step()
        if not self.rate:
            self.rate = 2 * n / (time.perf_counter() - began)
            self.channel.send(ipc.Stats(self.rate, {}))

    def turn(self) -> None:
        """Handle the messages that have come, then move chains once."""
        while self.channel.poll(0.0 if self.scheduler.groups else None):
            self.handle(self.channel.receive())
        if not self.scheduler.groups:
            return
        for moved in self.scheduler.advance():
            self.steps_taken += moved.work
            number = self.numbers[moved.group]
            task = self.tasks[number]
            task.finish(moved.finished)
            if task.done:
                seconds = time.perf_counter() - self.since[number]
                self._forget(number)
                self.channel.send(ipc.Response(number, task.result(), seconds))
            elif (preview := task.preview()) is not None:
                self.channel.send(ipc.Preview(number, preview))
        if (elapsed := time.monotonic() - self.rate_since) > STATS_SECONDS:
            share = 1 - math.exp(-elapsed / RATE_WINDOW)  # a quarter of a second alone varies too much
            self.rate += share * (self.steps_taken / elapsed - self.rate)
            self.rate_since = time.monotonic()
            self._send_stats()
        elif not self.scheduler.groups:
            self._send_stats()  # the steps that it ends with; so short a time tells no rate

    def handle(self, message: Any) -> None:
        """Start or drop a task, or allow its next preview."""
        match message:
            case ipc.Request(number, key, operation, payload, client) if operation in self.operations:
                if not self.scheduler.groups:
                    self.rate_since = time.monotonic()  # idle time does not count for the rate
                task: ChainTask = self.operations[operation](self.models[key], payload)
                task.group.client = client
                self.tasks[number], self.numbers[task.group], self.since[number] = task, number, time.perf_counter()
                self.scheduler.join(task.group)
            case ipc.Cancel(number) if number in self.tasks:  # it may have been answered meanwhile
                self.scheduler.leave(self.tasks[number].group)
                self._forget(number)
            case ipc.PreviewTaken(number) if number in self.tasks:
                self.tasks[number].preview_taken = True
            case _:
                super().handle(message)

    def _forget(self, number: int) -> None:
        del self.numbers[self.tasks.pop(number).group], self.since[number]

    def _send_stats(self) -> None:
        left = {number: task.group.left for number, task in self.tasks.items()}
        self.channel.send(ipc.Stats(self.rate, left, self.scheduler.longest_wait, self.steps_taken))
        self.steps_taken = 0
        self.scheduler.longest_wait = 0.0


def runs(model: Model, n: int) -> list[Callable[[], object]]:
    """Return what moves n chains by a step, gives n gradients, and classifies n images: what turns call, as far as the model has it."""
    m, label, found = model.bundle.manifest, np.zeros(n, np.int64), list[Callable[[], object]]()
    grey = np.full((n, 3, m.input.height, m.input.width), 0.5, np.float32)
    if "step" in model.bundle.functions:
        chains = Chains.start(model.prior, m.sampler, label + model.prior.labels[0], seed=0)
        found.append(lambda: model.engine.advance(chains, 1))
    if "score" in model.bundle.functions:
        found.append(lambda: model.engine.score(grey, label))
    return [*found, lambda: model.engine.classify(grey)]


def prepare(sizes: Sequence[int], run: Callable[[int], object]) -> None:
    """Run batches of these sizes, the smallest first; a larger one that fails, for want of memory say, is a warning."""
    for n in sizes:
        try:
            run(n)
        except Exception as error:  # whatever an engine raises
            if n == sizes[0]:
                raise
            log.warning(
                "no batch of %d is prepared, and requests that bring one may fail: %s: %s", n, type(error).__name__, first_line(error)
            )
            return
