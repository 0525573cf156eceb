"""The result cache: tasks run in chunks of 100 images, 500 on a GPU, each result a file named by a hash of all its inputs.

A chunk's key covers the sha256 of the model and its graphs, of the chunk's pixels and labels, and the task with its parameters. A
cached result is reused by every suite, part and n, and after a kill.
"""

import hashlib
import logging
import math
import multiprocessing
import os
import sys
import time
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ebjdat_serve.atomic import replacing
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.folders import folder as place
from ebjdat_serve.rows import Images, parse_images
from training.errors import TrainingError
from training.evaluation.evaluated_model import Arrays, EvaluatedModel, Spec
from training.loop.clock import duration

CHUNK = 100
CHUNK_GPU = 500
"""Small batches leave a GPU idle between launches, larger ones make a killed run lose more."""
CHUNK_PIXELS = 2**20
"""Pixels of a chunk, whose gradients take memory in proportion: 20 images of 224 x 224."""
EVERY = 60.0
"""Seconds between progress lines at INFO."""
WORTH_PROCESSES = 20.0
"""Seconds of work from which on worker processes, which take seconds to start, are used."""
FORMAT = 2
"""Increased when a task changes its computation, so that older results are not found."""

log = logging.getLogger("training")


class Task(Protocol):
    """A computation on labelled images: a frozen dataclass, whose repr is part of the key."""

    @property
    def cost(self) -> float:
        """Return the cost per image in forward passes, for estimates of the remaining time."""

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return arrays whose first axis is the images, and ``notes`` (strings) if there are any."""


def work_root() -> Path:
    """Return the folder that evaluations are kept in, under EBJDAT_RUNS."""
    return place("EBJDAT_RUNS", "runs") / "evaluation"


@dataclass(frozen=True)
class Chunk:
    """A task on a chunk of images."""

    work: Task
    image: Floats
    label: Labels

    def key(self, subject: str) -> str:
        """Return the name of the result's file; a task that does not use the model is ``shared`` by all models."""
        subject = "shared" if getattr(self.work, "shared", False) else subject
        digest = hashlib.sha256(np.ascontiguousarray(self.image).data)
        digest.update(np.ascontiguousarray(self.label).data)
        return hashlib.sha256(f"{FORMAT} {subject} {self.work!r} {digest.hexdigest()}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ResultCache:
    """Cached results under ``folder``, computed by ``processes`` workers of one thread each, or in this process when that is 1."""

    folder: Path
    spec: Spec
    subject: EvaluatedModel
    processes: int = 1
    workers: list[ProcessPoolExecutor] = field(default_factory=list, repr=False, compare=False)

    def run(self, title: str, todo: Sequence[tuple[Task, Floats, Labels]]) -> list[Arrays]:
        """Return the result of each (task, images, labels), computing missing chunks.

        Raises TrainingError when a worker dies; finished chunks are kept.
        """
        jobs = [
            [Chunk(work, image[i : i + size], label[i : i + size]) for i in range(0, len(label), size)]
            for work, image, label in todo
            for size in (self.chunk(image),)
        ]
        every = [piece for job in jobs for piece in job]
        files = {id(piece): self.folder / f"{piece.key(self.subject.key)}.npz" for piece in every}
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [piece for piece in every if read(files[id(piece)]) is None]
        if missing:
            self._compute(title, missing, files)
        return [join([read(files[id(piece)]) for piece in job]) for job in jobs]

    def chunk(self, image: Floats) -> int:
        """Return the number of images of a chunk: fewer of large ones."""
        most = CHUNK_GPU if self.subject.device.type == "cuda" else CHUNK
        return max(1, min(most, CHUNK_PIXELS // max(1, math.prod(image.shape[2:]))))

    def _compute(self, title: str, missing: list[Chunk], files: dict[int, Path]) -> None:
        progress = Progress(title, missing)
        # the most expensive first, so that none runs alone at the end
        missing = sorted(missing, key=lambda piece: -piece.work.cost * len(piece.label))
        while missing and (self.processes == 1 or progress.left < WORTH_PROCESSES or len(missing) == 1):
            piece = missing.pop()  # the cheapest, to estimate the time of the others
            write(files[id(piece)], piece.work.run(self.subject, piece.image, piece.label))
            progress.done(piece)
        if not missing:
            return
        try:
            futures = {self._pool().submit(do, files[id(piece)], piece): piece for piece in missing}
            try:
                for future in as_completed(futures):
                    future.result()
                    progress.done(futures[future])
            except BaseException:
                self.close()
                raise
        except BrokenProcessPool as error:
            raise TrainingError(
                "a worker process died, perhaps out of memory: run the same command to continue, with fewer processes if so",
                options=("--processes 1",),
            ) from error

    def _pool(self) -> ProcessPoolExecutor:
        """Return the worker pool, started once: each worker takes seconds to import torch and open the subject."""
        if not self.workers:
            context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the children: oversubscribed threads run many times slower
            self.workers.append(ProcessPoolExecutor(self.processes, context, open_here, (self.spec,)))
        return self.workers[0]

    def close(self) -> None:
        """Stop the workers; chunks not yet started are cancelled."""
        for pool in self.workers:
            pool.shutdown(wait=False, cancel_futures=True)
        self.workers.clear()


_SUBJECT: list[EvaluatedModel] = []


def open_here(spec: Spec) -> None:
    """Open the subject in a worker process."""
    torch.set_num_threads(1)
    _SUBJECT.append(spec())


def do(file: Path, piece: Chunk) -> None:
    """Compute one chunk in a worker process."""
    write(file, piece.work.run(_SUBJECT[0], piece.image, piece.label))


class Progress:
    """Progress lines: finished chunks, time spent, and an estimate of the time left."""

    def __init__(self, title: str, pieces: Sequence[Chunk]) -> None:
        self.title, self.count, self.finished = title, len(pieces), 0
        self.cost, self.spent = sum(piece.work.cost * len(piece.label) for piece in pieces), 0.0
        self.started = self.logged = self.announced = time.monotonic()

    @property
    def left(self) -> float:
        """Return the estimated seconds left, in one process; 0 before the first chunk."""
        return (time.monotonic() - self.started) * (self.cost - self.spent) / self.spent if self.spent else 0.0

    def done(self, piece: Chunk) -> None:
        """Count a chunk, and log progress every ten seconds and at the end; at INFO once a minute."""
        self.finished += 1
        self.spent += piece.work.cost * len(piece.label)
        now = time.monotonic()
        if now - self.logged < 10 and self.finished < self.count:
            return
        level = logging.INFO if now - self.announced >= EVERY else logging.DEBUG
        self.logged, self.announced, taken = now, now if level == logging.INFO else self.announced, now - self.started
        left = taken * (self.cost - self.spent) / self.spent
        spent, rest = duration(taken), duration(left)
        log.log(level, "  %s: %d/%d chunks, %s, about %s left", self.title, self.finished, self.count, spent, rest)


def write(file: Path, arrays: Arrays) -> None:
    """Write a result atomically; other processes may write the same one."""
    with replacing(file, shared=True) as temporary, temporary.open("wb") as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def read(file: Path) -> Arrays | None:
    """Return a result, or None when it is missing or cannot be read."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:  # closes the file even when it is not an archive
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        print(f"{file} is damaged ({error}): computed again", file=sys.stderr)
        return None


def load_arrays(folder: Path) -> dict[Images, Arrays]:
    """Return an evaluation's arrays of each set of images; empty if there are none."""
    return {parse_images(key): found for key, found in unflattened(load_flat(folder / "arrays.npz")).items()}


def load_flat(file: Path) -> Arrays:
    """Return stored arrays; empty if the file is missing."""
    return read(file) or {}


def unflattened(flat: Arrays) -> dict[str, Arrays]:
    """Return arrays named "set|field" as {set: {field: array}}."""
    found: dict[str, Arrays] = {}
    for key, value in flat.items():
        name, _, field = key.rpartition("|")
        found.setdefault(name, {})[field] = value
    return found


def join(parts: Sequence[Arrays | None]) -> Arrays:
    """Return the concatenated arrays of all parts."""
    whole = [part for part in parts if part is not None]
    assert len(whole) == len(parts), "a result was deleted while in use"
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}


def notes(lines: Sequence[str]) -> NDArray[np.str_]:
    """Return lines as an array, to store in a result."""
    return np.asarray(list(lines), dtype=np.str_).reshape(-1)


__all__ = ["CHUNK", "Arrays", "Chunk", "ResultCache", "Task", "notes"]
