"""The context passed to every part of the evaluation, and the suites: the number of images of each measurement."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ebjdat_serve.bundle import MANIFEST, Bundle, write_json
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.manifest import YES
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.rows import Images, Row
from ebjdat_serve.sentences import set_name
from ebjdat_serve.store import CURRENT
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
    """The number of images of each measurement."""

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
    thorough: bool = True  # the flag is attacked at every alpha, and the energy as well as the served score

    def at_most(self, n: int) -> "Suite":
        """Return the suite with at most n images per measurement; raise TrainingError for n < 1."""
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


LEAST = {
    "test": 20, "attacked": 1, "attacked_other": 1, "strong": 0, "autoattack": 0, "autoattack_other": 0, "checked": 1, "looked": 2,
    "hostile": 1, "shifted": 2, "samples": 50, "queries": 1,
}  # fmt: skip
"""The least that each number of a suite may be set to."""


def suite_of(name: str, n: int | None = None, settings: Sequence[str] = ()) -> Suite:
    """Return a suite with at most ``n`` images per measurement and NAME=N ``settings``; raise TrainingError for one that is none."""
    suite = SUITES[name] if n is None else SUITES[name].at_most(n)
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in LEAST or not (value.isascii() and value.isdigit() and len(value) < 10) or int(value) < LEAST[key]:
            known = ", ".join(f"{known} from {least} up" for known, least in LEAST.items())
            raise TrainingError(f"--amount {setting}: give NAME=N of {known}")
        changes: dict[str, Any] = {key: int(value)}
        suite = replace(suite, **changes)
    return suite


@dataclass
class Context:
    """One evaluation: the subject, its data, the suite, and the per-image results."""

    subject: EvaluatedModel
    data: Dataset
    suite: Suite
    ball: Ball
    ledger: ResultCache
    folder: Path
    bundle: Bundle | None = None
    surrogate: Path | None = None  # weights of the surrogate of transferred attacks
    surrogate_sha256: str = ""
    controls: tuple[Path, ...] = ()  # weights of controls, sampled with the same prior, steps and seeds
    buffer: Path | None = None  # a run's state.pt, whose replay buffer is compared with fresh chains
    images: dict[str, NDArray[np.bool_]] = field(default_factory=dict)  # per row's key and image: the successes of its proportion
    arrays: dict[Images, Arrays] = field(default_factory=dict)  # per set of images: logits, label, and gradient if measured
    drawings: dict[str, Arrays] = field(default_factory=dict)  # further data of the report's images
    part: str = ""  # the part being measured
    warnings: dict[str, list[str]] = field(default_factory=dict)  # of each part

    @property
    def where(self) -> Images:
        """Return the clean test images."""
        return Images(dataset=self.data.name, split="test")

    def test(self, n: int) -> tuple[Floats, Labels]:
        """Return the first n test images (N, 3, H, W) in [0,1] and their labels; all parts share the chunks of one n."""
        return unit(self.data.test.first(n))

    def run(self, title: str, *works: Task, n: int) -> list[Arrays]:
        """Return the result of each task on the first n test images."""
        image, label = self.test(n)
        return self.ledger.run(title, [(work, image, label) for work in works])

    def look(self, images: Images, work: Task, image: Floats, label: Labels | None = None) -> Arrays:
        """Return the result of ``work`` on a set of images, and keep it for the landscape."""
        nothing = np.zeros(len(image), np.int64)
        (result,) = self.ledger.run(set_name(images), [(work, image, nothing if label is None else label)])
        own = result["logits"].argmax(axis=1) if label is None else label  # OOD images have no class but the predicted one
        self.arrays[images] = {**result, "label": own}
        return self.arrays[images]

    def share(self, metric: str, good: NDArray[np.bool_], images: Images, of: str, **more: Any) -> Row:
        """Return the row of a proportion, keeping its per-image successes for paired tests; ``more`` are fields of the row."""
        row = proportion(metric, int(good.sum()), len(good), images, of, **more)
        self.images[row.key] = good
        return row

    def say(self, text: str) -> None:
        """Keep a warning of this part for the report, and log it; duplicates are dropped."""
        kept = self.warnings.setdefault(self.part, [])
        if text not in kept:
            kept.append(text)
            log.debug("  note: %s", text)

    @property
    def eot(self) -> int:
        """Return the number of passes that a gradient is averaged over: more than one for a model with random outputs."""
        return 16 if self.subject.random else 1

    def samplable(self) -> bool:
        """Return whether the model has the gradient that sampling needs; warn when it does not."""
        with torch.enable_grad():
            x = torch.from_numpy(self.test(1)[0]).to(self.subject.device).requires_grad_()
            if self.subject.network(x).requires_grad:
                return True
        self.say("samples: not drawn, the model gives no gradient")
        return False

    def drawable(self) -> bool:
        """Return whether samples can be drawn: not by an imported model that has no prior; warn when they cannot."""
        if self.bundle is not None and (why := self.bundle.manifest.capabilities.generate) != YES:
            self.say(f"samples: not drawn: {why}")
            return False
        return self.samplable()

    def attackers(self) -> bool:
        """Return whether the attack package is installed; warn when it is not."""
        if find_spec("pyautoattack") is None:
            self.say("AutoAttack and Square: not measured, the extra [evaluate] brings pyautoattack")
            return False
        return True

    def tell(self, found: Arrays, what: str) -> int:
        """Keep the attack package's warnings, and return their number."""
        lines, times = tally(found.get("notes", np.empty(0, np.str_)))
        for line in lines:
            self.say(f"{what}: {line}")
        return times


FORM = "fields"
"""Format version of an evaluation's files; those of other versions are not read."""


def claim(folder: Path, subject: dict[str, str]) -> None:
    """Mark a folder with the evaluation it holds; files of the same weights but another graph or format are removed.

    Raises TrainingError for a folder of another model or other data, for a store, and for a bundle, whose own figures would be replaced.
    """
    if (folder / MANIFEST).exists() or (folder / CURRENT).is_symlink():
        raise TrainingError(f"{folder} is a bundle or a store, with figures of its own: name another folder", options=("--folder FOLDER",))
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
        raise TrainingError("there are no images to measure on: use a data set with a test split")
    return to_unit(split.image), split.label
