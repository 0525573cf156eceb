"""Text renderings of rows: data set, attack, protocol and definition from a row's fields. No code parses them."""

from collections.abc import Callable, Iterable

from ebjdat_serve.rows import BUFFER, COMPARED, CONTROL, PRIOR, Images, Row

EXTRACTORS = {
    "resnet20": "64 features of ResNet-20, trained on CIFAR-10",
    "resnet4b": "a robust judge independent of the model: ResNet-4b of alpha-beta-CROWN, adversarially trained at l-inf 2/255",
    "efficientnet_lite0": "1,280 features of EfficientNet-Lite0 at 128 pixels, trained on ImageNet, never on CIFAR",
    "inception": "2,048 features of Inception-v3, the standard weights of FID",
}
OBJECTIVES = {"ce": "cross-entropy", "margin": "the margin"}
MOVED = {"none": "nothing", "ood": "the OOD images", "clean": "the clean images", "both": "both sets"}


def eps_name(eps: float) -> str:
    """Return eps in the usual notation: 8/255."""
    units = eps * 255
    return f"{units:.0f}/255" if abs(units - round(units)) < 1e-6 else f"{eps:g}"


def threat_name(norm: str | None, eps: float | None) -> str:
    """Return the name of a threat, l-inf 8/255 or l2 0.5, or an empty string."""
    if eps is None:
        return ""
    return f"l2 {eps:g}" if norm == "l2" else f"l-inf {eps_name(eps)}"


def images_name(images: Images) -> str:
    """Return the name of a set of images, without its attack."""
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
    """Return the name of a set of images with its attack: PGD-20 8/255 on cifar10 test."""
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
        case "apgd_ce_dlr":
            return "APGD-CE and APGD-DLR of AutoAttack"
        case "autoattack":
            return f"official {images.version} AutoAttack" if images.version else "AutoAttack"
        case "square":
            return "Square"
        case "transfer":
            return "transferred"
    return images.attack or ""


def data_words(row: Row) -> str:
    """Return the text of the column "data": the images of the figure."""
    name = set_name(row) if names_attack(row) else images_name(row)
    if row.against is None:
        return name
    count = f"{row.against_n:,} of " if row.against_n is not None else ""
    return f"{name} vs {count}{row.against}" + (f" {row.against_split}" if row.against_split else "")


def protocol_words(row: Row) -> str:
    """Return the text of the column "protocol": how the figure was measured."""
    words = [say(row) for say in WORDS if not (say is attack_words and names_attack(row))]
    return "; ".join(part for part in (*words, row.note) if part)


def names_attack(row: Row) -> bool:
    """Return whether the column "data" names the attack, as it does when attacked images are compared with others."""
    return row.attack is not None and row.against is not None and row.moved is None


def definition(row: Row) -> str:
    """Return the definition of the metric, or an empty string if its name is enough."""
    return DEFINITIONS[row.metric](row) if row.metric in DEFINITIONS else ""


def attack_words(row: Images) -> str:
    """Return the attack with its parameters as text."""
    threat = threat_name(row.norm, row.eps)
    match row.attack:
        case None:
            return ""
        case "pgd":
            parts = [attack_name(row) + (f" on {OBJECTIVES[row.objective]}" if row.objective else ""), threat]
        case "counterfactual":
            least = f", with probability {row.probability:g} or more" if row.probability is not None else ""
            parts = [f"the nearest image of the {row.objective}{least}, {row.steps} steps in the ball", threat]
        case "square":
            parts = [f"Square on the served model, {row.queries} queries", threat]
        case "transfer":
            by = f"the surrogate {row.surrogate} ({row.surrogate_of[:8]})" if row.surrogate_of else f"the {row.surrogate} network"
            parts = [f"PGD-{row.steps} on {by}" if row.surrogate else "transferred from a surrogate", threat]
        case "worst_case":
            parts = [f"right under every one of {', '.join(row.attacks or ())}", threat]
        case "released_autoattack":
            listed = f"APGD-CE {row.steps}, untargeted APGD-DLR {row.steps}, FAB-T {row.steps} clamped to the wrong box"
            parts = [f"{listed}, Square {row.queries:,}", threat]
        case "score":
            parts = [f"PGD-{row.steps} from {row.restarts} starts and Square of {row.queries} queries on the score", threat]
        case "evasion":
            found = f"PGD-{row.steps} joint, selective and orthogonal, {row.restarts} starts each, and Square of {row.queries} queries"
            parts = [threat, f"{found} on both aims, and points of APGD-CE and APGD-T that pass"]
        case "reach":
            parts = [
                threat,
                f"PGD-{row.steps} on margin, search (BPDA) and OOD score at once, {row.restarts} variants, the worst of each image",
            ]
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
    """Return the text for the precision whose calibration sets the flag."""
    if row.calibration is None:
        return ""
    return "its own calibration" if row.calibration == row.precision else f"{row.calibration}'s calibration"


def flag_words(row: Row) -> str:
    """Return the OOD score and the level of its flag as text."""
    parts = [f"alpha {row.alpha:g}" if row.alpha is not None else "", f"score {row.score}" if row.score else ""]
    parts += [f"policy of {' + '.join(row.views)}"] if row.views else []
    parts += [f"search within l-inf {eps_name(row.radius)}"] if row.radius else []
    parts += [calibration_words(row), f"moves {MOVED[row.moved]}" if row.moved else ""]
    parts.append("Beta-binomial 99 % interval [{:.4f}, {:.4f}]".format(*row.expected) if row.expected else "")
    return ", ".join(part for part in parts if part)


def probability_words(row: Row) -> str:
    """Return bins and temperature of a figure of p(y|x) as text."""
    parts = [f"{row.bins} bins" if row.bins else "", {"1": "temperature 1", "fitted": "fitted temperature"}.get(row.temperature or "", "")]
    parts.append(f"labels drawn from p itself, mean of {row.draws} draws" if row.draws else "")
    return ", ".join(part for part in parts if part)


def judge_words(row: Row) -> str:
    """Return the name of the network that judges images."""
    return EXTRACTORS.get(row.extractor, row.extractor) if row.extractor else ""


def sampler_words(row: Row) -> str:
    """Return the sampler that generated the images as text."""
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
    """Return batch, threads and device of the computation as text."""
    parts = [f"batch {row.batch}" if row.batch else "", f"{row.threads} CPU thread" if row.threads else "", row.device or ""]
    return ", ".join(part for part in parts if part)


def interval_words(row: Row) -> str:
    """Return the kind of an interval, unless it is the Wilson interval of a proportion."""
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
"""The parts of a protocol, in reading order."""


def observed(row: Row, name: str) -> float:
    """Return one of the row's observed figures."""
    return (row.observed or {}).get(name, float("nan"))


def beats(row: Row) -> str:
    """Return the text of the check that no black-box attack breaks images that the gradient does not."""
    box = {"white_box_beats_square": "square", "white_box_beats_transfer": "transfer"}[row.check or ""]
    alone = f"{box} breaks {observed(row, 'alone'):.3f} of the images that PGD-20 on both objectives leaves, at most {row.limit:g}"
    return f"{alone}; {box} {observed(row, 'black_box'):.3f}, white box {observed(row, 'white_box'):.3f}"


def positives(row: Row) -> str:
    """Return the text for the positives of a separation."""
    if row.subset is None:
        return "positives are the first set"
    return f"positives are the {row.subset}, negatives all clean images of the attack"


def gap(row: Row) -> str:
    """Return the text for the reference of an energy gap."""
    return "mean of E(x_adv) - E(x) on the same images, nats" if row.attack else "mean energy less that of clean test images, nats"


def constant(text: str) -> Callable[[Row], str]:
    """Return a definition that is the same for every row."""
    return lambda row: text


def of_every(name: str, kinds: Iterable[str], words: Callable[[Row], str]) -> dict[str, Callable[[Row], str]]:
    """Return the definitions of a metric with a name for each of ``kinds``."""
    return {name.format(kind): words for kind in kinds}


def speed(row: Row) -> str:
    """Return the text for how two engines' speeds were compared."""
    return f"images/s over fp32's, calls interleaved, 20th percentile of {row.n} CPU times"


def of_precisions() -> dict[str, Callable[[Row], str]]:
    """Return the definitions of the metrics of a lower precision."""
    every: dict[str, Callable[[Row], str]] = {
        "logit_error_max": constant("largest difference from fp32's logits over the largest logit"),
        "logit_error_over_spread": constant("largest difference from fp32's logits over the largest less the smallest logit"),
        "energy_error_max": constant("largest difference from fp32's energy, nats"),
        "energy_error_mean_over_sd": constant("mean distance from fp32's energy over the deviation of fp32's energies"),
        "label_disagreement": constant("share of images whose class differs from fp32's"),
        "accuracy_clean": constant("of the served model"),
        "accuracy_clean_drop": constant("fp32's accuracy minus this one's"),
        "accuracy_pgd20_transfer_drop": constant("fp32's accuracy minus this one's"),
        "accuracy_square_drop": constant("fp32's accuracy minus this one's"),
        "step_error_max": lambda row: f"pixels of [0,1], after {row.steps} Langevin steps",
        "flag_rate_excess": constant("distance from the interval that the flag rate should lie in"),
        "auroc_interpolations": constant("positives are the first set, each by its precision's own calibration"),
        "graph_bytes": constant("classify graph; weights.safetensors is shared"),
        "ratio_classify_batch1": speed,
        "ratio_classify_batch32": speed,
    }
    return {f"{name}_{precision}": words for name, words in every.items() for precision in ("fp16", "bf16", "int8")}


DEFINITIONS: dict[str, Callable[[Row], str]] = {
    **dict.fromkeys(("accuracy_clean", "accuracy_corrupted", "accuracy_shifted"), constant("of the served model")),
    **dict.fromkeys(("energy_mean", "energy_sd", "energy_samples"), constant("nats")),
    "temperature": constant("fitted to p(y|x)"),
    "accuracy_corrupted_mean": lambda row: f"{row.kinds} kinds of each image",
    "autoattack_warnings": constant("warnings of the package"),
    "accuracy_pgd20_released_code": lambda row: f"released-code: {eps_name(2 * (row.eps or 0))} of [-1,1]",
    "accuracy_autoattack_released_code": lambda row: f"released-code: {eps_name(2 * (row.eps or 0))} of [-1,1]",
    "loss_at_steps": constant("mean cross-entropy after so many steps"),
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
    "masking_suspected": constant("1 when any check but determinism failed"),
    "accuracy_unmasked": constant("because masking is suspected; an upper bound"),
    "attack_success": constant("wrong after the attack, of the images right before it"),
    **of_every("auroc_{}", COMPARED, positives),
    **of_every("aupr_{}", COMPARED, lambda row: positives(row) + (f", {1 - row.against_n / row.n:.3f} of all" if row.against_n else "")),
    **of_every("fpr95_{}", COMPARED, constant("share of the first set that passes as clean when 95 % of clean images do")),
    **{
        f"sets_better_than_{a}_{b}": constant("share of the sets with the higher AUROC; of attacks, the subset")
        for a in COMPARED
        for b in COMPARED
    },
    "flag_rate_mixture": constant("images handled as those of the calibration are, of which p-values speak"),
    "share_of_flags": constant("share of the flagged images of which this view's term is the largest"),
    "accuracy_with_rejection": constant("no misclassified, unflagged point of the ball was found"),
    "accuracy_at_half_eps": constant("a detector robust at eps implies some classifier robust at eps/2 (arXiv 2107.11630); this one under"),
    "unstable": constant("share for which the search finds another label"),
    "review_share": constant("share that the policy sends to review; alpha is the share of clean images asked for"),
    "error": constant("share of wrong answers"),
    "aurc": constant("area under the risk-coverage curve, most suspicious images refused first; lower is better"),
    "reach_auroc": lambda row: f"positives are the {row.subset}, negatives all clean images of the attack",
    "reach_auroc_right": lambda row: f"positives are the {row.subset}, negatives the clean images that are classified right",
    "reach_power": constant("share flagged by the score's own calibration"),
    "accuracy_with_search": constant("no wrong point of the ball was found that the policy accepts and the search finds stable"),
    "accuracy_less_radius": lambda row: f"robust accuracy without rejection at eps less the radius {eps_name(row.radius or 0.0)}",
    "clean_rejected": constant("share of clean images that the policy or the search rejects"),
    "accuracy_accepted": constant("of the clean images that are not rejected"),
    "explanation_valid": constant("share of images for which one was found"),
    "explanation_l1_median": constant("of those found, pixels of [0,1]"),
    "explanation_l2_median": constant("of those found, pixels of [0,1]"),
    "explanation_agreement_oracle": lambda row: (
        f"of those found, takes them for the class; {observed(row, 'before'):.3f} before the change"
    ),
    "inception_score": lambda row: f"mean of {row.splits} splits",
    **of_every(
        "frechet_infinity_{}",
        EXTRACTORS,
        lambda row: f"extrapolated to infinitely many of these, not of the {row.against_n} reals: compare it with the floor",
    ),
    **of_every("kernel_distance_{}", EXTRACTORS, lambda row: f"cubic kernel, unbiased, mean of {row.blocks} disjoint blocks"),
    **of_every("precision_{}", EXTRACTORS, lambda row: f"k = {row.k}, {row.reals} reals"),
    **of_every("recall_{}", EXTRACTORS, lambda row: f"k = {row.k}, {row.reals} reals"),
    "neighbour_distance_ratio": lambda row: f"median l2 distance to the nearest over that of {row.reals} test images",
    "memorised": lambda row: (
        f"share nearer than half of the nearest test image's distance, {observed(row, 'nearest_test'):.2f} in pixels of [0,1]"
    ),
    **of_every("{}_gap", ("energy", "joint_energy"), gap),
    **of_every("{}_gap_over_sd", ("energy", "joint_energy"), constant("|gap| in deviations of the clean energies")),
    **of_every("{}_w1_over_sd", ("energy", "joint_energy"), constant("Wasserstein-1 in deviations of the clean energies")),
    **of_every(
        "{}_overlap",
        ("energy", "joint_energy"),
        lambda row: "overlap of histograms, square root of n bins" + (", the floor of overlaps" if row.subset else ""),
    ),
    "energy_gap_adv": constant("mean E(x_adv) - E(x), nats"),
    "energy_gap_adv_over_sd": constant("|mean E(x_adv) - E(x)| / sd E(x)"),
    **of_precisions(),
}
"""Definitions of metrics, by full name."""
