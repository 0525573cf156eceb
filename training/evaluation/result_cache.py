"""Work in chunks of 100 images, of 500 on a GPU, that survive a kill: each result is a file, named after all that it depends on.

A chunk's key holds the sha256 of the model and its graphs, of the chunk's pixels and labels, and the work with its numbers; what is
there is never done again, whichever suite, part or n asks for it.
"""

import hashlib
import logging
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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ebjdat_serve.atomic import replacing
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.folders import folder as place
from ebjdat_serve.rows import Images, parse_images
from training.errors import TrainingError
from training.evaluation.evaluated_model import EvaluatedModel, Spec
from training.loop.clock import duration

CHUNK = 100
CHUNK_GPU = 500
"""Small batches leave a GPU idle between launches, larger ones make a killed run lose more."""
EVERY = 60.0
"""Seconds between two lines of progress for people who want a line a stage."""
WORTH_PROCESSES = 20.0
"""Seconds of work for which worker processes are started: they take some themselves."""
FORMAT = 2
"""Raised when a kind of work changes what it computes: older results are then not found."""

log = logging.getLogger("training")
Arrays = dict[str, NDArray[Any]]


class Task(Protocol):
    """Something done to labelled images, a frozen dataclass: its repr is part of the key."""

    @property
    def cost(self) -> float:
        """Return what one image costs, in forward passes: what the time left is reckoned with."""

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return arrays whose first axis is the images, and ``notes`` (strings) where there is something to say."""


def work_root() -> Path:
    """Return the folder that evaluations are kept in, under EBJDAT_RUNS."""
    return place("EBJDAT_RUNS", "runs") / "evaluation"


@dataclass(frozen=True)
class Chunk:
    """Some work on some images."""

    work: Task
    image: Floats
    label: Labels

    def key(self, subject: str) -> str:
        """Return the name of the result's file; work that asks nothing of the model is ``shared`` by all models."""
        subject = "shared" if getattr(self.work, "shared", False) else subject
        digest = hashlib.sha256(np.ascontiguousarray(self.image).data)
        digest.update(np.ascontiguousarray(self.label).data)
        return hashlib.sha256(f"{FORMAT} {subject} {self.work!r} {digest.hexdigest()}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class ResultCache:
    """Results under ``folder``; done by ``processes`` workers of one thread each, or here when that is 1."""

    folder: Path
    spec: Spec
    subject: EvaluatedModel
    processes: int = 1
    workers: list[ProcessPoolExecutor] = field(default_factory=list, repr=False, compare=False)

    def run(self, title: str, todo: Sequence[tuple[Task, Floats, Labels]]) -> list[Arrays]:
        """Return the result of each (work, images, labels), computing in chunks what is not there yet.

        Raises TrainingError when a worker died; what was finished stays.
        """
        size = CHUNK_GPU if self.subject.device.type == "cuda" else CHUNK
        jobs = [[Chunk(work, image[i : i + size], label[i : i + size]) for i in range(0, len(label), size)] for work, image, label in todo]
        every = [piece for job in jobs for piece in job]
        files = {id(piece): self.folder / f"{piece.key(self.subject.key)}.npz" for piece in every}
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [piece for piece in every if read(files[id(piece)]) is None]
        if missing:
            self._compute(title, missing, files)
        return [join([read(files[id(piece)]) for piece in job]) for job in jobs]

    def _compute(self, title: str, missing: list[Chunk], files: dict[int, Path]) -> None:
        progress = Progress(title, missing)
        # the dearest first, so that none is left alone at the end
        missing = sorted(missing, key=lambda piece: -piece.work.cost * len(piece.label))
        while missing and (self.processes == 1 or progress.left < WORTH_PROCESSES or len(missing) == 1):
            piece = missing.pop()  # the cheapest, which tells how long the others will take
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
                "a worker process died, perhaps for want of memory: the same command goes on where this stopped; fewer processes need less",
                options=("--processes 1",),
            ) from error

    def _pool(self) -> ProcessPoolExecutor:
        """Return the workers, started once: importing torch and opening the subject takes each some seconds."""
        if not self.workers:
            context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
            os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the children: two threads beside two others run many times slower
            self.workers.append(ProcessPoolExecutor(self.processes, context, open_here, (self.spec,)))
        return self.workers[0]

    def close(self) -> None:
        """End the workers, what they have not begun left undone."""
        for pool in self.workers:
            pool.shutdown(wait=False, cancel_futures=True)
        self.workers.clear()


_SUBJECT: list[EvaluatedModel] = []


def open_here(spec: Spec) -> None:
    """Open the subject in a worker process."""
    torch.set_num_threads(1)
    _SUBJECT.append(spec())


def do(file: Path, piece: Chunk) -> None:
    """Do one chunk in a worker process."""
    write(file, piece.work.run(_SUBJECT[0], piece.image, piece.label))


class Progress:
    """Lines with what is done, how long it took and about how long the rest will take."""

    def __init__(self, title: str, pieces: Sequence[Chunk]) -> None:
        self.title, self.count, self.finished = title, len(pieces), 0
        self.cost, self.spent = sum(piece.work.cost * len(piece.label) for piece in pieces), 0.0
        self.started = self.said = self.told = time.monotonic()

    @property
    def left(self) -> float:
        """Return the seconds that are left, in one process; 0 while nothing is known."""
        return (time.monotonic() - self.started) * (self.cost - self.spent) / self.spent if self.spent else 0.0

    def done(self, piece: Chunk) -> None:
        """Count a chunk, and say so every ten seconds and at the end; every minute also to those who want a line a stage."""
        self.finished += 1
        self.spent += piece.work.cost * len(piece.label)
        now = time.monotonic()
        if now - self.said < 10 and self.finished < self.count:
            return
        level = logging.INFO if now - self.told >= EVERY else logging.DEBUG
        self.said, self.told, taken = now, now if level == logging.INFO else self.told, now - self.started
        left = taken * (self.cost - self.spent) / self.spent
        spent, rest = duration(taken), duration(left)
        log.log(level, "  %s: %d/%d chunks, %s, about %s left", self.title, self.finished, self.count, spent, rest)


def write(file: Path, arrays: Arrays) -> None:
    """Write a result, so that what is there is whole; others may write the same one."""
    with replacing(file, shared=True) as aside, aside.open("wb") as opened:
        np.savez_compressed(opened, **arrays)  # type: ignore[arg-type]


def read(file: Path) -> Arrays | None:
    """Return a result, or None when it is not there or cannot be read."""
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:  # closed also when it is no archive
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, EOFError, ValueError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        print(f"{file} is damaged ({error}): done again", file=sys.stderr)
        return None


def load_arrays(folder: Path) -> dict[Images, Arrays]:
    """Return what an evaluation kept of each set of images, nothing where it kept none."""
    return {parse_images(key): found for key, found in unflattened(load_flat(folder / "arrays.npz")).items()}


def load_flat(file: Path) -> Arrays:
    """Return stored arrays, none when there are none."""
    return read(file) or {}


def unflattened(flat: Arrays) -> dict[str, Arrays]:
    """Return arrays that are named "set|field" by set and field."""
    found: dict[str, Arrays] = {}
    for key, value in flat.items():
        name, _, field = key.rpartition("|")
        found.setdefault(name, {})[field] = value
    return found


def join(parts: Sequence[Arrays | None]) -> Arrays:
    """Return the arrays of all parts end to end."""
    whole = [part for part in parts if part is not None]
    assert len(whole) == len(parts), "a result vanished while it was in use"
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]}


def notes(lines: Sequence[str]) -> NDArray[np.str_]:
    """Return lines as an array that a result can hold."""
    return np.asarray(list(lines), dtype=np.str_).reshape(-1)


__all__ = ["CHUNK", "Arrays", "Chunk", "ResultCache", "Task", "notes"]
