"""Explanations: how often a counterfactual is found, how far away, and whether a robust oracle, another network, sees the class too."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ebjdat_serve.bundle import sha256
from ebjdat_serve.counterfactual import BISECTIONS, LONGEST, RADIUS, STEPS, Norm, Searches, advance, rivals
from ebjdat_serve.energy import score
from ebjdat_serve.engines import Floats, Labels
from ebjdat_serve.pixels import to_bytes, to_unit
from ebjdat_serve.rows import Images, Row
from training.evaluation.attacks import Predict
from training.evaluation.context import Context
from training.evaluation.evaluated_model import EvaluatedModel, load_weights, module_sha256, weights_spec
from training.evaluation.result_cache import Arrays, ResultCache
from training.evaluation.rows import SEED, number, proportion

MODELS = Path(__file__).parents[2] / "benchmarks" / "models"
ORACLES = ("wrn28-pgd7", "pgd-at")
"""Plain PGD-AT networks that judge; the first that is not the subject. The shipped model and pgd-at began from the same weights."""
LIKELY = 0.5
"""Probability of the target that the second search asks for."""
SEARCHES: tuple[tuple[Norm, float], ...] = (("l2", 0.0), ("l2", LIKELY), ("linf", 0.0))
RUNNER_UP, RANDOM = "runner-up", "random class"


class Gradients:
    """What a search needs of a subject: its served logits, and the score of its network."""

    def __init__(self, subject: EvaluatedModel) -> None:
        self._subject = subject

    def classify(self, image: Floats) -> tuple[Floats, Floats]:
        """Return logits (N, K) and energy (N,)."""
        logits = self._subject.logits(image)
        return logits, -np.logaddexp.reduce(logits, axis=1)

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,)."""
        device = self._subject.device
        gradient, energies = score(self._subject.network, torch.from_numpy(image).to(device), torch.from_numpy(label).to(device))
        return gradient.cpu().numpy(), energies.cpu().numpy()


@dataclass(frozen=True)
class Explain:
    """Searches for the nearest image of the class that is passed as the label."""

    norm: Norm
    radius: float
    least: float

    @property
    def cost(self) -> float:
        return 7.0 * STEPS + BISECTIONS

    def run(self, subject: EvaluatedModel, image: Floats, label: Labels) -> Arrays:
        """Return valid (N,), and image (N, H, W, 3) uint8 as delivered by the server."""
        searches = Searches.start(image, subject.logits(image), label, norm=self.norm, radius=self.radius, least=self.least)
        searches = advance(Gradients(subject), searches, LONGEST)
        return {"valid": searches.found, "image": to_bytes(searches.best)}


def explanation_rows(c: Context) -> Iterator[Row]:
    """Yield validity, distances and the oracle's agreement, of the runner-up and of a random other class, and with a larger probability."""
    if not c.samplable():
        return
    image, label = c.test(c.suite.looked)
    logits = c.ledger.run("clean", [(Predict(), image, label)])[0]["logits"]
    own, classes = logits.argmax(axis=1), logits.shape[1]
    drawn = (own + np.random.default_rng(SEED).integers(1, classes, len(own))) % classes
    oracle = oracle_of(c)
    for target_name, target in ((RUNNER_UP, rivals(logits, own)), (RANDOM, drawn)):
        for norm, least in SEARCHES:
            work = Explain(norm, RADIUS[norm], least)
            (found,) = c.ledger.run(f"explanations, {target_name}, {norm}", [(work, image, target)])
            images = replace(
                c.where, attack="counterfactual", norm=norm, eps=work.radius, steps=STEPS, objective=target_name, probability=least or None
            )
            yield from rows_of(c, images, image, target, found, oracle)


def rows_of(c: Context, images: Images, image: Floats, target: Labels, found: Arrays, oracle: ResultCache | None) -> Iterator[Row]:
    """Yield the rows of one kind of search."""
    valid, of = found["valid"], c.subject.graph
    yield c.share("explanation_valid", valid, images, of)
    if not valid.any():
        return
    counterfactual, n = to_unit(found["image"][valid]), int(valid.sum())
    delta = np.abs(counterfactual - image[valid]).reshape(n, -1).astype(np.float64)
    yield number("explanation_l1_median", np.median(delta.sum(axis=1)), n, images, of)
    yield number("explanation_l2_median", np.median(np.linalg.norm(delta, axis=1)), n, images, of)
    if oracle is None:
        return
    says = [oracle.run("oracle", [(Predict(), x, target[valid])])[0]["logits"].argmax(axis=1) for x in (counterfactual, image[valid])]
    agree, before = (int((one == target[valid]).sum()) for one in says)
    name = f"{oracle.subject.name} ({oracle.subject.weights[:8]})"
    yield proportion("explanation_agreement_oracle", agree, n, images, of, extractor=name, observed={"before": before / n})


def oracle_of(c: Context) -> ResultCache | None:
    """Return the oracle with a cache of its own, None where no committed network has the data's classes."""
    for name in ORACLES if c.data.name == "cifar10" else ():
        file = MODELS / name / "weights.safetensors"
        if file.is_file() and c.subject.weights not in (sha256(file), module_sha256(load_weights(file))):
            spec = weights_spec(file, c.subject.device)
            return ResultCache(c.ledger.folder, spec, spec(), c.ledger.processes)
    c.say("agreement of a robust oracle: not measured, no adversarially trained network of this data is kept")
    return None
