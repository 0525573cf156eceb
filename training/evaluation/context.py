"""What every part of the evaluation is given, and the amounts of a suite."""

import json
import logging
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebjdat_serve.bundle import Bundle, write_json
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import set_name
from training.data.datasets import Dataset
from training.data.image_folders import Split
from training.errors import TrainingError
from training.evaluation.autoattack import tally
from training.evaluation.evaluated_model import EvaluatedModel
from training.evaluation.result_cache import Arrays, ResultCache, Task
from training.evaluation.rows import Ball, proportion

log = logging.getLogger("training")


@dataclass(frozen=True)
class Suite:
    """How many images each measurement is made on."""

    test: int  # clean
    attacked: int  # PGD at eps
    attacked_other: int  # PGD at eps/2, in l2 and on the margin
    strong: int  # APGD, restarts, Square, transfer
    autoattack: int  # full, at eps
    autoattack_other: int  # full, at eps/2 and in l2
    checked: int  # masking: loss against steps, accuracy against eps
    looked: int  # energies under attack
    hostile: int  # robust OOD, rejection
    shifted: int  # benign shifts and corruptions
    samples: int
    queries: int = 5000  # of Square
    thorough: bool = True  # the flag is attacked at every alpha, and the energy beside the served score

    def at_most(self, n: int) -> "Suite":
        """Return the suite with no measurement on more than n images; raise TrainingError for none."""
        if n < 1:
            raise TrainingError(f"n = {n}: give 1 or more")
        amounts = {name: min(value, n) for name, value in vars(self).items() if name not in ("queries", "samples", "thorough")}
        return replace(self, **amounts)


SUITES = {
    "quick": Suite(
        test=1_000,
        attacked=500,
        attacked_other=500,
        strong=100,
        autoattack=0,
        autoattack_other=0,
        checked=100,
        looked=300,
        hostile=50,
        shifted=300,
        samples=300,
        queries=300,
        thorough=False,
    ),
    "full": Suite(
        test=10_000,
        attacked=10_000,
        attacked_other=10_000,
        strong=1_000,
        autoattack=1_000,
        autoattack_other=1_000,
        checked=500,
        looked=1_000,
        hostile=500,
        shifted=1_000,
        samples=10_000,
    ),
}


@dataclass
class Context:
    """One evaluation: the subject, its data, how much of it, and what was seen of each image."""

    subject: EvaluatedModel
    data: Dataset
    suite: Suite
    ball: Ball
    ledger: ResultCache
    folder: Path
    bundle: Bundle | None = None
    surrogate: Path | None = None  # weights that transferred attacks are made on
    surrogate_sha256: str = ""
    controls: tuple[Path, ...] = ()  # weights that are sampled with the same prior, steps and seeds
    buffer: Path | None = None  # a run's state.pt, whose replay buffer is measured beside fresh chains
    images: dict[str, NDArray[np.bool_]] = field(default_factory=dict)  # per row's key and image: what its proportion was counted from
    arrays: dict[Images, Arrays] = field(default_factory=dict)  # per set of images: logits, label, perhaps gradient
    drawings: dict[str, Arrays] = field(default_factory=dict)  # what images are made of beside those
    part: str = ""  # that is being measured
    warnings: dict[str, list[str]] = field(default_factory=dict)  # of each part

    @property
    def where(self) -> Images:
        """Return the clean test images."""
        return Images(dataset=self.data.name, split="test")

    def test(self, n: int) -> tuple[Floats, Labels]:
        """Return the first n test images (N, 3, H, W) in [0,1] and their labels; chunks of one count are shared by all parts."""
        return unit(self.data.test.first(n))

    def run(self, title: str, *works: Task, n: int) -> list[Arrays]:
        """Return the results of each work on the first n test images."""
        image, label = self.test(n)
        return self.ledger.run(title, [(work, image, label) for work in works])

    def look(self, images: Images, work: Task, image: Floats, label: Labels | None = None) -> Arrays:
        """Return what ``work`` says of a set of images, and keep it for the landscape."""
        nothing = np.zeros(len(image), np.int64)
        (result,) = self.ledger.run(set_name(images), [(work, image, nothing if label is None else label)])
        own = result["logits"].argmax(axis=1) if label is None else label  # strange images have no class but the one the model names
        self.arrays[images] = {**result, "label": own}
        return self.arrays[images]

    def share(self, metric: str, good: NDArray[np.bool_], images: Images, of: str, **more: Any) -> Row:
        """Return the row of a proportion, which of its images count kept for paired tests; ``more`` are fields of the row."""
        row = proportion(metric, int(good.sum()), len(good), images, of, **more)
        self.images[row.key] = good
        return row

    def say(self, text: str) -> None:
        """Keep a warning of this part for the report, and log it; the same one is kept once."""
        kept = self.warnings.setdefault(self.part, [])
        if text not in kept:
            kept.append(text)
            log.debug("  note: %s", text)

    @property
    def eot(self) -> int:
        """Return how many passes a gradient is averaged over: more than one for a model that answers at random."""
        return 16 if self.subject.random else 1

    def samplable(self) -> bool:
        """Return whether the model gives the gradient that chains follow; say so when it does not."""
        with torch.enable_grad():
            x = torch.from_numpy(self.test(1)[0]).to(self.subject.device).requires_grad_()
            if self.subject.network(x).requires_grad:
                return True
        self.say("samples: not drawn, the model gives no gradient")
        return False

    def attackers(self) -> bool:
        """Return whether the attack package is here; say so when it is not."""
        if find_spec("pyautoattack") is None:
            self.say("AutoAttack and Square: not measured, the extra [evaluate] brings pyautoattack")
            return False
        return True

    def tell(self, found: Arrays, what: str) -> int:
        """Keep what the attack package warned of, and return how often it did."""
        lines, times = tally(found.get("notes", np.empty(0, np.str_)))
        for line in lines:
            self.say(f"{what}: {line}")
        return times


FORM = "fields"
"""How the files of an evaluation are written: another's are not read."""


def claim(folder: Path, subject: dict[str, str]) -> None:
    """Write into a folder whose evaluation it holds; what is there of the same weights, but of another graph or form, is removed.

    Raises TrainingError for a folder of another model or other data.
    """
    file = folder / "subject.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else subject
    if {**known, "graph": subject["graph"], "form": subject["form"]} != subject:
        text = f"{folder} holds the evaluation of another model or other data: name another folder"
        raise TrainingError(text, options=("--folder FOLDER",))
    if known != subject:
        for stale in ("metrics.json", "images.npz", "arrays.npz", "drawings.npz", "warnings.json"):
            (folder / stale).unlink(missing_ok=True)
    write_json(file, subject)


def unit(split: Split) -> tuple[Floats, Labels]:
    """Return a split's images (N, 3, H, W) in [0,1] and labels."""
    if len(split) == 0:
        raise TrainingError("a measurement on no images: it needs a data set with a test split")
    return to_unit(split.image), split.label
