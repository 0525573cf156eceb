"""A row of metrics.json: one figure, and in fields all that it depends on. Sentences are rendered from the fields, here and nowhere else.

Code selects rows by ``metric`` and fields. It never looks into a sentence, a ``note`` or a part of a metric's name.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ebjdat_serve.errors import BundleError
from ebjdat_serve.scores import SCORES

FRESH, PRIOR, CONTROL, BUFFER = "fresh samples", "prior draws", "control samples", "replay buffer"
GENERATED = (FRESH, PRIOR, CONTROL, BUFFER)
"""Sets of images that were drawn: another model's are other images."""
ALL_SETS = "all sets"


@dataclass(frozen=True, kw_only=True)
class Images:
    """A set of images, by all that makes it what it is; a field that does not apply is None.

    dataset         data set or set by name: cifar10, svhn_train_first1080, blank images, fresh samples, all sets
    split           test, selection, calibration, train
    subset          fooled or not fooled by the attack; one half of the images
    shift           benign shift, as JPEG q75
    corruption      one kind of corruption; severity: 1 to 5; recipe: own, where it is not CIFAR-10-C's; kinds: how many are pooled
    attack          pgd, apgd (APGD-CE and APGD-T), autoattack, square, transfer, worst_case (all of ``attacks``), released_autoattack,
                    score (on the detection score), evasion (wrong and not flagged)
    norm, eps       linf or l2; radius in pixels of [0,1]
    objective       ce (cross-entropy) or margin
    steps           of the attack, or of the sampler
    step_over_eps   step size of the attack over eps
    restarts        random starts
    iterate         each: an image counts as fooled by any iterate; last: by the last one
    eot, answers    passes that a gradient is averaged over, and that an answer is the mean of: models that answer at random
    version         of AutoAttack: standard or rand
    queries         of Square
    surrogate       network that the attack was made on; surrogate_of: sha256 of its weights
    attacks         metrics of the attacks that a worst case is over
    control         model that the control samples are of; control_of: sha256 of its weights
    step_size, grad_clip, noise_std   of the sampler: pixels of [0,1], but the clip, of a gradient's components
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
    """One figure of some images; its keys in metrics.json are these fields, those that do not apply are left out.

    metric, value   what was measured
    n               images that it rests on
    of              sha256 of the weights or the graph that was measured
    seed            of every random choice
    interval        95 % interval; interval_kind: wilson (of a proportion) or normal (of a mean); or stderr, the standard error
    part            of the evaluation that measures it
    against         data set that the images are compared with; against_split: the split; against_n: how many images of it
    score, alpha    OOD score; level that its flag is set at
    baseline        score that ``score`` is compared with
    moved           which images an attack on the score perturbs: none, ood, clean, both
    expected        interval that the value, or the rate that it is about, should lie in
    temperature     of p(y|x): 1 or fitted; bins, draws: of the calibration error and of its floor
    extractor       network whose features or classes judge the images; k: of the nearest neighbours
    reals           real images that the figure is relative to, beside ``against``
    blocks, splits  parts that a mean is over
    precision       of the graph: fp16, bf16, int8; calibration: precision whose calibration sets the flag; fp32: value of fp32
    provider, device, batch, threads   what computed it, and how
    check, limit    name of a check on gradients; what ``observed`` may be at most
    observed        figures by name that decided the value
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
        """Raise ValueError for an interval and a standard error at once, or an interval of no kind."""
        if self.interval is not None and self.stderr is not None:
            raise ValueError("interval and stderr are not both given")
        if (self.interval is None) != (self.interval_kind is None):
            raise ValueError("interval and interval_kind are given together")

    @cached_property
    def images(self) -> Images:
        """Return the set of images that the figure is of."""
        return Images(**{field.name: getattr(self, field.name) for field in fields(Images)})

    @cached_property
    def key(self) -> str:
        """Return what makes two rows the same measurement, whoever is measured, on however many images, and whatever came out."""
        return json.dumps({name: value for name, value in to_json(self).items() if name not in OUTCOME}, sort_keys=True)


OUTCOME = {
    *("value", "n", "of", "seed", "interval", "interval_kind", "stderr", "part", "against_n", "reals", "blocks", "splits"),
    *("expected", "fp32", "provider", "observed", "note"),
}
"""Fields that do not tell one measurement from another."""
FIRST = ("metric", "value", "interval", "interval_kind", "stderr", "n")
"""Keys that a reader of the JSON meets first."""
KINDS: dict[str, Any] = {
    name: next((kind for kind in get_args(hint) if kind is not NoneType), hint) if NoneType in get_args(hint) else hint
    for name, hint in get_type_hints(Row).items()
}
REQUIRED = ("metric", "value", "n", "dataset", "of", "seed")


def to_json(images: Images) -> dict[str, Any]:
    """Return the fields that apply, of images or a row, as plain JSON types."""
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
        raise BundleError(f"{where}: unknown keys {unknown}, missing keys {missing}; python training/evaluate.py measures such rows anew")
    try:
        return Row(**{name: _value(KINDS[name], value, f"{where}: {name}") for name, value in data.items()})
    except ValueError as error:
        raise BundleError(f"{where}: {error}") from error


def parse_rows(data: Any, file: Path) -> list[Row]:
    """Return the rows of a parsed ``file``; raise BundleError naming the file, the row and the key of what is none."""
    if not isinstance(data, list):
        raise BundleError(f"{file} must be a list of rows")
    return [parse_row(row, f"{file}: row {i}") for i, row in enumerate(data)]


def parse_images(text: str) -> Images:
    """Return the images that ``images_key`` wrote."""
    return Images(**{name: _value(KINDS[name], value, name) for name, value in json.loads(text).items()})


def images_key(images: Images) -> str:
    """Return images as text that a file can be keyed by."""
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
    """Return the rows of a metric whose fields are those ``wanted``; None is a field that does not apply."""
    return [row for row in rows if row.metric == metric and all(getattr(row, name) == value for name, value in wanted.items())]


def first(rows: Iterable[Row], metric: str, **wanted: Any) -> Row | None:
    """Return the first row of ``rows_where``, None where there is none."""
    return next(iter(rows_where(rows, metric, **wanted)), None)


# Sentences -------------------------------------------------------------------------------------------------------------

COMPARED = (*SCORES, "gradient_norm")
"""The OOD scores that figures are of: those that can be served, and the norm of the input gradient."""
EXTRACTORS = {
    "resnet20": "64 features of ResNet-20, trained on CIFAR-10",
    "resnet4b": "a robust judge independent of the model: ResNet-4b of alpha-beta-CROWN, adversarially trained at l-inf 2/255",
    "efficientnet_lite0": "1,280 features of EfficientNet-Lite0 at 128 pixels, trained on ImageNet, never on CIFAR",
    "inception": "2,048 features of Inception-v3, the standard weights of FID",
}
OBJECTIVES = {"ce": "cross-entropy", "margin": "the margin"}
MOVED = {"none": "nothing", "ood": "the OOD images", "clean": "the clean images", "both": "both sets"}


def eps_name(eps: float) -> str:
    """Return eps as the field writes it: 8/255."""
    units = eps * 255
    return f"{units:.0f}/255" if abs(units - round(units)) < 1e-6 else f"{eps:g}"


def threat_name(norm: str | None, eps: float | None) -> str:
    """Return a threat in words: l-inf 8/255, l2 0.5; nothing where there is none."""
    if eps is None:
        return ""
    return f"l2 {eps:g}" if norm == "l2" else f"l-inf {eps_name(eps)}"


def images_name(images: Images) -> str:
    """Return a set of images in words, without the attack that it is under."""
    text = f"{images.dataset} {images.split}" if images.split else images.dataset
    if images.control:
        text += f" of {images.control} ({(images.control_of or '')[:8]})"
    if images.severity is not None:
        what = images.corruption or (f"{images.kinds} corruptions" if images.kinds else "corrupted")
        text += f", {what}, severity {images.severity}" + (f", {images.recipe} recipe" if images.recipe else "")
    if images.shift:
        text += f" after {images.shift}"
    return f"{text}, {images.subset}" if images.subset else text


def set_name(images: Images) -> str:
    """Return a set of images in words, with the attack that it is under: PGD-20 8/255 on cifar10 test."""
    if images.attack is None or images.eps is None:
        return images_name(images)
    return f"{attack_name(images)} {eps_name(images.eps)} on {images_name(images)}"


def attack_name(images: Images) -> str:
    """Return the short name of the attack: PGD-20."""
    match images.attack:
        case "pgd":
            return f"PGD-{images.steps}"
        case "apgd":
            return "APGD-CE and APGD-T of AutoAttack"
        case "autoattack":
            return f"official {images.version} AutoAttack" if images.version else "AutoAttack"
        case "square":
            return "Square"
        case "transfer":
            return "transferred"
    return images.attack or ""


def data_words(row: Row) -> str:
    """Return what the figure is of, in words: the column "data"."""
    name = set_name(row) if names_attack(row) else images_name(row)
    if row.against is None:
        return name
    count = f"{row.against_n:,} of " if row.against_n is not None else ""
    return f"{name} vs {count}{row.against}" + (f" {row.against_split}" if row.against_split else "")


def protocol_words(row: Row) -> str:
    """Return how the figure was made, in words: the column "protocol"."""
    words = [say(row) for say in WORDS if not (say is attack_words and names_attack(row))]
    return "; ".join(part for part in (*words, row.note) if part)


def names_attack(row: Row) -> bool:
    """Return whether the column "data" names the attack: images under it are compared with others."""
    return row.attack is not None and row.against is not None and row.moved is None


def definition(row: Row) -> str:
    """Return what the metric is, where its name does not say it."""
    return DEFINITIONS[row.metric](row) if row.metric in DEFINITIONS else ""


def attack_words(row: Images) -> str:
    """Return the attack in words, with its numbers."""
    threat = threat_name(row.norm, row.eps)
    match row.attack:
        case None:
            return ""
        case "pgd":
            parts = [attack_name(row) + (f" on {OBJECTIVES[row.objective]}" if row.objective else ""), threat]
        case "square":
            parts = [f"Square alone on what is served, {row.queries} queries", threat]
        case "transfer":
            by = f"the surrogate {row.surrogate} ({row.surrogate_of[:8]})" if row.surrogate_of else f"the {row.surrogate} network"
            parts = [f"PGD-{row.steps} on {by}" if row.surrogate else "transferred from a surrogate", threat]
        case "worst_case":
            parts = [f"left by every one of {', '.join(row.attacks or ())}", threat]
        case "released_autoattack":
            listed = f"APGD-CE {row.steps}, untargeted APGD-DLR {row.steps}, FAB-T {row.steps} clamped to the wrong box"
            parts = [f"{listed}, Square {row.queries:,}", threat]
        case "score":
            parts = [f"PGD-{row.steps} from {row.restarts} starts and Square of {row.queries} queries on the score", threat]
        case "evasion":
            found = f"PGD-{row.steps} joint, selective and orthogonal, {row.restarts} starts each, and Square of {row.queries} queries"
            parts = [threat, f"{found} on both aims, and points of APGD-CE and APGD-T that pass"]
        case _:
            parts = [attack_name(row), threat]
    if row.attack == "pgd":
        parts += [f"step eps/{1 / row.step_over_eps:g}"] if row.step_over_eps else []
        parts += [f"{row.restarts} random start{'s' if row.restarts > 1 else ''}"] if row.restarts else []
    parts += {"each": ["each iterate counts"], "last": ["the last iterate counts"]}.get(row.iterate or "", [])
    if row.eot:
        parts.append(f"gradients averaged over {row.eot} passes, answers the mean of {row.answers}")
    return ", ".join(part for part in parts if part)


def calibration_words(row: Row) -> str:
    """Return whose calibration sets the flag of a lower precision, in words."""
    if row.calibration is None:
        return ""
    return "its own calibration" if row.calibration == row.precision else f"{row.calibration}'s calibration"


def flag_words(row: Row) -> str:
    """Return the OOD score and the level of its flag in words."""
    parts = [f"alpha {row.alpha:g}" if row.alpha is not None else "", f"score {row.score}" if row.score else ""]
    parts += [calibration_words(row), f"moves {MOVED[row.moved]}" if row.moved else ""]
    parts.append("Beta-binomial 99 % interval [{:.4f}, {:.4f}]".format(*row.expected) if row.expected else "")
    return ", ".join(part for part in parts if part)


def probability_words(row: Row) -> str:
    """Return bins and temperature of a figure of p(y|x) in words."""
    parts = [f"{row.bins} bins" if row.bins else "", {"1": "temperature 1", "fitted": "fitted temperature"}.get(row.temperature or "", "")]
    parts.append(f"labels drawn from p itself, mean of {row.draws} draws" if row.draws else "")
    return ", ".join(part for part in parts if part)


def judge_words(row: Row) -> str:
    """Return the network that judges images in words."""
    return EXTRACTORS.get(row.extractor, row.extractor) if row.extractor else ""


def sampler_words(row: Row) -> str:
    """Return how images were drawn, in words."""
    if row.dataset == PRIOR:
        return "no step"
    if row.dataset == BUFFER:
        return "persistent chains of training, none fresh"
    if row.extractor and row.split == "test":
        return f"real against real, the floor at n = {row.n}"
    if row.step_size is None:
        return ""
    clip = f"gradient clip {row.grad_clip:g}, " if row.grad_clip is not None else ""
    text = f"{row.steps} SGLD steps of {row.step_size:g}, {clip}noise {row.noise_std:g}, from the prior"
    return f"{text}, the same seeds" if row.dataset == CONTROL else text


def place_words(row: Row) -> str:
    """Return what computed the figure, in words."""
    parts = [f"batch {row.batch}" if row.batch else "", f"{row.threads} CPU thread" if row.threads else "", row.device or ""]
    return ", ".join(part for part in parts if part)


def interval_words(row: Row) -> str:
    """Return the kind of an interval that is no proportion's."""
    return "normal 95 % interval" if row.interval_kind == "normal" else ""


WORDS: tuple[Callable[[Row], str], ...] = (
    definition,
    attack_words,
    flag_words,
    probability_words,
    judge_words,
    sampler_words,
    place_words,
    interval_words,
)
"""A protocol's parts, in the order that they are read in."""


def observed(row: Row, name: str) -> float:
    """Return one of the figures that decided the value."""
    return (row.observed or {}).get(name, float("nan"))


def beats(row: Row) -> str:
    """Return in words whether a black box breaks images that the gradient does not."""
    box = {"white_box_beats_square": "square", "white_box_beats_transfer": "transfer"}[row.check or ""]
    alone = f"{box} breaks {observed(row, 'alone'):.3f} of the images that PGD-20 on both objectives leaves, at most {row.limit:g}"
    return f"{alone}; {box} {observed(row, 'black_box'):.3f}, white box {observed(row, 'white_box'):.3f}"


def positives(row: Row) -> str:
    """Return in words which images a separation takes for positives."""
    if row.subset is None:
        return "positives are the first set"
    return f"positives are the {row.subset}, negatives all clean images of the attack"


def gap(row: Row) -> str:
    """Return in words what the mean energy is compared with."""
    return "mean of E(x_adv) - E(x) on the same images, nats" if row.attack else "mean energy less that of clean test images, nats"


def said(text: str) -> Callable[[Row], str]:
    """Return a definition that is the same for every row."""
    return lambda row: text


def of_every(name: str, kinds: Iterable[str], words: Callable[[Row], str]) -> dict[str, Callable[[Row], str]]:
    """Return the definition of a metric that has a name for each of some kinds."""
    return {name.format(kind): words for kind in kinds}


def speed(row: Row) -> str:
    """Return in words how two engines' speeds were compared."""
    return f"images/s over fp32's, calls interleaved, 20th percentile of {row.n} CPU times"


def of_precisions() -> dict[str, Callable[[Row], str]]:
    """Return the definitions of what a lower precision costs."""
    every: dict[str, Callable[[Row], str]] = {
        "logit_error_max": said("largest difference from fp32's logits over the largest logit"),
        "energy_error_max": said("largest difference from fp32's energy, nats"),
        "energy_error_mean_over_sd": said("mean distance from fp32's energy over the deviation of fp32's energies"),
        "label_disagreement": said("share of images whose class differs from fp32's"),
        "accuracy_clean": said("what is served"),
        "accuracy_clean_drop": said("fp32's accuracy minus this one's"),
        "accuracy_pgd20_transfer_drop": said("fp32's accuracy minus this one's"),
        "accuracy_square_drop": said("fp32's accuracy minus this one's"),
        "step_error_max": lambda row: f"pixels of [0,1], after {row.steps} Langevin steps",
        "flag_rate_excess": said("distance from the interval that the flag rate should lie in"),
        "graph_bytes": said("classify graph; weights.safetensors is shared"),
        "ratio_classify_batch1": speed,
        "ratio_classify_batch32": speed,
    }
    return {f"{name}_{precision}": words for name, words in every.items() for precision in ("fp16", "bf16", "int8")}


DEFINITIONS: dict[str, Callable[[Row], str]] = {
    **dict.fromkeys(("accuracy_clean", "accuracy_corrupted", "accuracy_shifted"), said("what is served")),
    **dict.fromkeys(("energy_mean", "energy_sd", "energy_samples"), said("nats")),
    "temperature": said("fitted to p(y|x)"),
    "accuracy_corrupted_mean": lambda row: f"{row.kinds} kinds of each image",
    "autoattack_warnings": said("times that the package warned"),
    "accuracy_pgd20_released_code": lambda row: f"released-code: {eps_name(2 * (row.eps or 0))} of [-1,1]",
    "accuracy_autoattack_released_code": lambda row: f"released-code: {eps_name(2 * (row.eps or 0))} of [-1,1]",
    "loss_at_steps": said("mean cross-entropy after so many steps"),
    "check_falls_to_zero": lambda row: f"accuracy is {observed(row, 'accuracy'):.3f}, at most {row.limit:g}",
    "check_loss_rises_with_steps": lambda row: (
        f"mean cross-entropy from 1 to {row.steps} steps: {observed(row, 'first'):.3g} to {observed(row, 'last'):.3g}, never falling"
    ),
    "check_gradients_exist": lambda row: f"no usable gradient at {observed(row, 'share'):.3f} of the images, at most {row.limit:g}",
    "check_deterministic": lambda row: (
        f"two answers differ on {observed(row, 'share'):.3f} of the images; if they do, gradients are averaged"
    ),
    "check_noise_is_weaker": lambda row: (
        f"accuracy under uniform noise in the ball {observed(row, 'noise'):.3f}, no lower than {observed(row, 'pgd'):.3f} under PGD"
    ),
    "check_white_box_beats_square": beats,
    "check_white_box_beats_transfer": beats,
    "masking_suspected": said("1 when any check but determinism failed"),
    "accuracy_unmasked": said("because masking is suspected; an upper bound"),
    "attack_success": said("wrong after the attack, of the images right before it"),
    **of_every("auroc_{}", COMPARED, positives),
    **of_every("aupr_{}", COMPARED, lambda row: positives(row) + (f", {1 - row.against_n / row.n:.3f} of all" if row.against_n else "")),
    **of_every("fpr95_{}", COMPARED, said("share of the first set that passes as clean when 95 % of clean images do")),
    **{
        f"sets_better_than_{a}_{b}": said("share of the sets with the higher AUROC; of attacks, the subset")
        for a in COMPARED
        for b in COMPARED
    },
    "accuracy_with_rejection": said("no point of the ball was found that is wrong and not flagged"),
    "accuracy_at_half_eps": said("a detector robust at eps implies some classifier robust at eps/2 (arXiv 2107.11630); this one under"),
    "inception_score": lambda row: f"mean of {row.splits} splits",
    **of_every(
        "frechet_infinity_{}",
        EXTRACTORS,
        lambda row: f"extrapolated to infinitely many of these, not of the {row.against_n} reals: read it beside the floor",
    ),
    **of_every("kernel_distance_{}", EXTRACTORS, lambda row: f"cubic kernel, unbiased, mean of {row.blocks} disjoint blocks"),
    **of_every("precision_{}", EXTRACTORS, lambda row: f"k = {row.k}, {row.reals} reals"),
    **of_every("recall_{}", EXTRACTORS, lambda row: f"k = {row.k}, {row.reals} reals"),
    "neighbour_distance_ratio": lambda row: f"median l2 distance to the nearest over that of {row.reals} test images",
    "memorised": lambda row: (
        f"share nearer than half of the nearest test image's distance, {observed(row, 'nearest_test'):.2f} in pixels of [0,1]"
    ),
    **of_every("{}_gap", ("energy", "joint_energy"), gap),
    **of_every("{}_gap_over_sd", ("energy", "joint_energy"), said("|gap| in deviations of the clean energies")),
    **of_every("{}_w1_over_sd", ("energy", "joint_energy"), said("Wasserstein-1 in deviations of the clean energies")),
    **of_every(
        "{}_overlap",
        ("energy", "joint_energy"),
        lambda row: "overlap of histograms, square root of n bins" + (", the floor of overlaps" if row.subset else ""),
    ),
    "energy_gap_adv": said("mean E(x_adv) - E(x), nats"),
    "energy_gap_adv_over_sd": said("|mean E(x_adv) - E(x)| / sd E(x)"),
    **of_precisions(),
}
"""What a metric is, by its whole name."""
