"""Rows of metrics.json: one figure, and fields for everything it depends on. ebjdat_serve/sentences.py renders the fields as text.

Code selects rows by ``metric`` and fields, and never parses a sentence, a ``note`` or a metric's name.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ebjdat_serve.errors import BundleError
from ebjdat_serve.scores import SCORES
from ebjdat_serve.views import VIEWS

SUM = "views"
"""The served OOD score: the sum of the terms of the bundle's views."""


def alone(view: str) -> str:
    """Return the name of the OOD score that is one view's term alone."""
    return f"view_{view}"


COMPARED = (SUM, *map(alone, VIEWS), *SCORES, "gradient_norm")
"""The OOD scores that are evaluated: the served sum, each view alone, scores of the logits, and the norm of the input gradient."""
FRESH, PRIOR, CONTROL, BUFFER = "fresh samples", "prior draws", "control samples", "replay buffer"
GENERATED = (FRESH, PRIOR, CONTROL, BUFFER)
"""Sets of generated images, which differ from model to model."""
ALL_SETS = "all sets"


@dataclass(frozen=True, kw_only=True)
class Images:
    """The identity of a set of images; a field that does not apply is None.

    dataset         data set or set by name: cifar10, svhn_train_first1080, blank images, fresh samples, all sets
    split           test, selection, calibration, train
    subset          fooled or not fooled by the attack; one half of the images
    shift           benign shift, as JPEG q75
    corruption      one kind of corruption; severity: 1 to 5; recipe: own, where it is not CIFAR-10-C's; kinds: how many are pooled
    attack          pgd, apgd (APGD-CE and APGD-T), apgd_ce_dlr, autoattack, square, transfer, worst_case (all of ``attacks``),
                    released_autoattack, score (on the detection score), evasion (wrong and not flagged), reach (wrong, accepted by
                    the policy and stable under the search), counterfactual (the nearest image of another class)
    norm, eps       linf or l2; radius in pixels of [0,1]
    objective       ce (cross-entropy) or margin; of a counterfactual its class: runner-up or random class
    probability     of its class that a counterfactual must have
    steps           of the attack, or of the sampler
    step_over_eps   step size of the attack over eps
    restarts        random starts
    iterate         each: an image counts as fooled by any iterate; last: by the last one
    eot, answers    passes that a gradient and an output are averaged over, for models with random outputs
    version         of AutoAttack: standard or rand
    queries         of Square
    surrogate       network that was attacked; surrogate_of: sha256 of its weights
    attacks         metrics of the attacks of a worst case
    control         model that generated the control samples; control_of: sha256 of its weights
    step_size, grad_clip, noise_std   of the sampler, in pixels of [0,1]; grad_clip bounds a gradient's components
    """

    dataset: str
    split: str | None = None
    subset: str | None = None
    shift: str | None = None
    corruption: str | None = None
    severity: int | None = None
    recipe: str | None = None
    kinds: int | None = None
    attack: str | None = None
    norm: str | None = None
    eps: float | None = None
    objective: str | None = None
    probability: float | None = None
    steps: int | None = None
    step_over_eps: float | None = None
    restarts: int | None = None
    iterate: str | None = None
    eot: int | None = None
    answers: int | None = None
    version: str | None = None
    queries: int | None = None
    surrogate: str | None = None
    surrogate_of: str | None = None
    attacks: tuple[str, ...] | None = None
    control: str | None = None
    control_of: str | None = None
    step_size: float | None = None
    grad_clip: float | None = None
    noise_std: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row(Images):
    """One figure of a set of images; its keys in metrics.json are these fields, without those that do not apply.

    metric, value   name and value
    n               number of images
    of              sha256 of the measured weights or graph
    seed            of every random choice
    interval        95 % interval; interval_kind: wilson (of a proportion) or normal (of a mean); or stderr, the standard error
    part            of the evaluation
    against         data set that the images are compared with; against_split: the split; against_n: how many images of it
    score, alpha    OOD score; level of its flag
    baseline        score that ``score`` is compared with
    radius          of the search for another label around an image, l-inf, pixels of [0,1]
    views           p-values that a policy combines; alpha is then the share of clean images that it sends to review
    moved           which images an attack on the score perturbs: none, ood, clean, both
    expected        interval in which the value, or the rate it is about, should lie
    temperature     of p(y|x): 1 or fitted; bins, draws: of the calibration error and of its floor
    extractor       network whose features or classes are used; k: number of nearest neighbours
    reals           number of real images that the figure is relative to, besides ``against``
    blocks, splits  number of parts that a mean is over
    precision       of the graph: fp16, bf16, int8; calibration: precision whose calibration sets the flag; fp32: value of fp32
    provider, device, batch, threads   of the computation
    check, limit    name of a check on gradients; upper limit of ``observed``
    observed        figures by name that determined the value
    note            text to show
    """

    metric: str
    value: float
    n: int
    of: str
    seed: int
    interval: tuple[float, float] | None = None
    interval_kind: str | None = None
    stderr: float | None = None
    part: str | None = None
    against: str | None = None
    against_split: str | None = None
    against_n: int | None = None
    score: str | None = None
    alpha: float | None = None
    baseline: str | None = None
    radius: float | None = None
    views: tuple[str, ...] | None = None
    moved: str | None = None
    expected: tuple[float, float] | None = None
    temperature: str | None = None
    bins: int | None = None
    draws: int | None = None
    extractor: str | None = None
    k: int | None = None
    reals: int | None = None
    blocks: int | None = None
    splits: int | None = None
    precision: str | None = None
    calibration: str | None = None
    fp32: float | None = None
    provider: str | None = None
    device: str | None = None
    batch: int | None = None
    threads: int | None = None
    check: str | None = None
    limit: float | None = None
    observed: dict[str, float] | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for both an interval and a standard error, or an interval without a kind."""
        if self.interval is not None and self.stderr is not None:
            raise ValueError("give interval or stderr, not both")
        if (self.interval is None) != (self.interval_kind is None):
            raise ValueError("give interval and interval_kind together")

    @cached_property
    def images(self) -> Images:
        """Return the set of images of the figure."""
        return Images(**{field.name: getattr(self, field.name) for field in fields(Images)})

    @cached_property
    def key(self) -> str:
        """Return the key of the measurement, which does not depend on the model, the number of images or the result."""
        return json.dumps({name: value for name, value in to_json(self).items() if name not in OUTCOME}, sort_keys=True)


OUTCOME = {
    *("value", "n", "of", "seed", "interval", "interval_kind", "stderr", "part", "against_n", "reals", "blocks", "splits"),
    *("expected", "fp32", "provider", "observed", "note"),
}
"""Fields that are not part of a measurement's key."""
FIRST = ("metric", "value", "interval", "interval_kind", "stderr", "n")
"""Keys that come first in the JSON."""
KINDS: dict[str, Any] = {
    name: next((kind for kind in get_args(hint) if kind is not NoneType), hint) if NoneType in get_args(hint) else hint
    for name, hint in get_type_hints(Row).items()
}
REQUIRED = ("metric", "value", "n", "dataset", "of", "seed")


def to_json(images: Images) -> dict[str, Any]:
    """Return the fields of images or a row that apply, as plain JSON types."""
    names = [field.name for field in fields(images)]
    ordered = [*(name for name in FIRST if name in names), *(name for name in names if name not in FIRST)]
    found = {name: getattr(images, name) for name in ordered}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items() if value is not None}


def parse_row(data: Any, where: str) -> Row:
    """Return an object of metrics.json as a row; raise BundleError naming ``where`` and the key that is unknown, missing or ill-typed."""
    if not isinstance(data, dict):
        raise BundleError(f"{where}: expected an object, found {type(data).__name__}")
    unknown, missing = sorted(set(data) - set(KINDS)), sorted(set(REQUIRED) - set(data))
    if unknown or missing:
        raise BundleError(f"{where}: unknown keys {unknown}, missing keys {missing}; python training/evaluate.py writes such rows again")
    try:
        return Row(**{name: _value(KINDS[name], value, f"{where}: {name}") for name, value in data.items()})
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from error


def parse_rows(data: Any, file: Path) -> list[Row]:
    """Return the rows of a parsed ``file``; raise BundleError naming the file, row and key of an invalid one."""
    if not isinstance(data, list):
        raise BundleError(f"{file} must be a list of rows")
    return [parse_row(row, f"{file}: row {i}") for i, row in enumerate(data)]


def parse_images(text: str) -> Images:
    """Return the images of a key from ``images_key``."""
    return Images(**{name: _value(KINDS[name], value, name) for name, value in json.loads(text).items()})


def images_key(images: Images) -> str:
    """Return images as a string key for files."""
    return json.dumps(to_json(images), sort_keys=True)


def _value(kind: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, list) and (arguments[-1] is ... or len(value) == len(arguments)):
        return tuple(_value(arguments[0], item, where) for item in value)
    if origin is dict and isinstance(value, dict):
        return {name: _value(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    raise BundleError(f"{where}: {value!r} is not {getattr(kind, '__name__', kind)}")


def rows_where(rows: Iterable[Row], metric: str, **wanted: Any) -> list[Row]:
    """Return the rows of a metric whose fields equal ``wanted``; None matches a field that does not apply."""
    return [row for row in rows if row.metric == metric and all(getattr(row, name) == value for name, value in wanted.items())]


def first(rows: Iterable[Row], metric: str, **wanted: Any) -> Row | None:
    """Return the first row of ``rows_where``, or None."""
    return next(iter(rows_where(rows, metric, **wanted)), None)
