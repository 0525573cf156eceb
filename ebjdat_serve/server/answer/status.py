"""Answers of /health, /info and /."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from ebjdat_serve import __version__
from ebjdat_serve.card import score_words
from ebjdat_serve.decoding.header import Limits as ImageLimits
from ebjdat_serve.decoding.judge import accepted
from ebjdat_serve.detection import flag_range
from ebjdat_serve.drift import LEVEL, share_interval
from ebjdat_serve.manifest import Capabilities, FittedPrior, Input, Licence, Provenance
from ebjdat_serve.server.answer import Schema
from ebjdat_serve.server.drift_states import Drift
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.sgld import Sampler


class Health(Schema):
    """Whether every worker is ready, and no stop signal has come."""

    status: Literal["ok", "not ready", "stopping"]


class Index(Schema):
    """Where to go from here."""

    model: str
    paths: list[str]


class ModelEntry(Schema):
    """A model of this server."""

    name: Annotated[str, Field(description="as in /models/NAME/classify")]
    model: str
    ready: Annotated[bool, Field(description="whether every worker of it is ready")]
    default: Annotated[bool, Field(description="whether paths without a name mean it")]
    memory_bytes: Annotated[int | None, Field(description="of its workers, what they share with others in parts; null: not known here")]


class Models(Schema):
    """The models of this server, the default first."""

    models: list[ModelEntry]


class CalibrationInfo(Schema):
    """What ``suspicious`` is decided by: the OOD score's views, those left out with the reason, and the images that p-values speak of."""

    name: Annotated[str, Field(description="images: made of images; any other: of recorded scores (serve --calibration)")]
    available: Annotated[list[str], Field(description="the names that serve --calibration takes, stale ones included")]
    means: Annotated[str, Field(description="what p-values speak of, in a sentence")]
    made: Annotated[str | None, Field(description="when; null: on images")]
    n: int
    of: str
    dataset: str
    handled: Annotated[float, Field(description="share of these images that were lightly handled: recompressed, resized or the like")]
    views: list[str]
    left_out: dict[str, str]
    reviewed: Annotated[list[str], Field(description="what `decision` looks at")]
    review_share: Annotated[float, Field(description="expected share of such images that goes to review")]


class FlagRate(Schema):
    """The share of images that is flagged, an interval that holds its rate at all times together with 95 %, and what was calibrated."""

    rate: float
    low: float
    high: float
    expected: Annotated[float, Field(description="of images like the calibration images, on average over calibration sets of this size")]
    expected_low: Annotated[float, Field(description="by 95 of 100 such sets, with expected_high")]
    expected_high: float


class DriftInfo(Schema):
    """Whether the traffic of this version is like the calibration images: docs/drift.md."""

    means: Annotated[str, Field(description="what the evidence means, in a sentence")]
    since: str
    images: int
    repeated: Annotated[int, Field(description="pictures that were sent again, which are not counted")]
    log_e: Annotated[float, Field(description="log e-value of the drift test, nats")]
    log_e_alarm: Annotated[
        float, Field(description="where the alarm is: traffic like the calibration images ever gets there with 1 in 1,000")
    ]
    alarm: Annotated[str | None, Field(description="when it was raised")]
    jumper_log_e: Annotated[float, Field(description="of the simple jumper martingale, which ends in false alarms, to compare")]
    flagged: FlagRate
    p_values: Annotated[list[int], Field(description="images by p-value: up to .1, .2 … 1")]


class ClientLimitsInfo(Schema):
    """What the client that asks may have: requests per second, and requests, unfinished bodies and chains at a time; null: no limit."""

    rate: float | None = None
    requests: int | None = None
    bodies: int | None = None
    chains: int | None = None


class LimitsInfo(Schema):
    """Limits of one request, and of the work in progress."""

    body_bytes: int
    image_bytes: int
    image_pixels: int
    jpeg_pixels: Annotated[int, Field(description="of a JPEG that is reduced while it is decoded, as the model's size allows")]
    formats: tuple[str, ...]
    images: int
    n: int
    steps: int
    n_times_steps: int
    scale: int
    chains: int
    backlog_seconds: float
    client: ClientLimitsInfo


class ClassifyLoad(Schema):
    """Requests to /classify and /energy in progress."""

    requests: int
    workers: int


class GenerateLoad(ClassifyLoad):
    """Requests to /generate in progress."""

    chains: int
    chain_steps_left: int
    chain_steps_per_second: float
    longest_wait_seconds: float


class Load(Schema):
    """What is in progress."""

    classify: ClassifyLoad
    generate: Annotated[GenerateLoad | None, Field(description="absent on a server that draws nothing")] = None


class Refresh(Schema):
    """The version being opened, the last one refused, and those kept for requests that began on them."""

    opening: str | None
    refused: dict[str, str] | None
    retiring: list[str]


class Info(Schema):
    """The model, what runs it, the limits, what is in progress, and the measured figures."""

    model: str
    architecture: dict[str, Any]
    output: Annotated[Literal["logits", "probabilities"], Field(description="what the network gives; probabilities have no energy")]
    labels: list[str]
    input: Input
    sampler: Sampler
    prior: Annotated[FittedPrior | None, Field(description="what was fitted to a folder; null: in training, to every class, or not at all")]
    provenance: Provenance
    capabilities: Annotated[Capabilities, Field(description='"yes", or the reason why not')]
    licence: Licence
    engine: str
    provider: Annotated[str, Field(description="absent until a worker is ready")] = ""
    precision: Annotated[str, Field(description="absent until a worker is ready")] = ""
    alpha: float
    ood_score: Annotated[str, Field(description="what `suspicion` is")]
    calibration: Annotated[CalibrationInfo | None, Field(description="null: no p-value, no flag and no decision, and no guessed threshold")]
    drift: Annotated[DriftInfo | None, Field(description="null: not calibrated")]
    limits: LimitsInfo
    load: Load
    refresh: Refresh
    metrics: Annotated[list[Any], Field(description="rows of the bundle's metrics.json")]
    version: str


def calibration_info(served: ServedModel) -> CalibrationInfo | None:
    """Return what the flag is decided by, None for a model that is not calibrated."""
    if (c := served.calibration) is None:
        return None
    handled = f", {c.handled:.0%} of them lightly handled" if c.handled else ""
    means = f"p-values hold for images exchangeable with the {len(c.scores):,} of {c.dataset}{handled}"
    if recorded := served.recorded:
        means = f"p-values {recorded.guarantee}; flags and shares under metrics are by the calibration on images"
    return CalibrationInfo(
        name=served.calibration_name,
        available=list(served.calibrations),
        means=means,
        made=recorded.made if recorded else None,
        n=len(c.scores),
        of=c.of,
        dataset=c.dataset,
        handled=c.handled,
        views=c.views,
        left_out=c.left_out,
        reviewed=c.reviewed,
        review_share=served.review_share or 0.0,
    )


def drift_info(drift: Drift | None) -> DriftInfo | None:
    """Return what the drift test says, None for a model that is not calibrated."""
    if drift is None:
        return None
    test = drift.test
    low, high = share_interval(drift.flagged, test.t)
    expected, expected_low, expected_high = flag_range(test.n, drift.alpha)
    return DriftInfo(
        means=drift.words,
        since=drift.since,
        images=test.t,
        repeated=drift.repeated,
        log_e=drift.log_e,
        log_e_alarm=-math.log(LEVEL),
        alarm=drift.alarm or None,
        jumper_log_e=float(drift.jumper.log_e),
        flagged=FlagRate(
            rate=drift.flagged / max(1, test.t),
            low=low,
            high=high,
            expected=expected,
            expected_low=expected_low,
            expected_high=expected_high,
        ),
        p_values=test.tenths(),
    )


def info_answer(
    served: ServedModel,
    settings: Settings,
    *,
    drift: Drift | None,
    steps: int,
    client: ClientLimitsInfo,
    engine_info: dict[str, str],
    load: Load,
    refresh: dict[str, Any],
) -> Info:
    """Return the answer of /info; ``steps`` is the most steps of a chain, ``client`` what the one who asks may have."""
    manifest, calibration, s = served.bundle.manifest, served.calibration, settings
    return Info(
        model=served.name,
        architecture=manifest.architecture,
        output=manifest.output,
        labels=manifest.labels,
        input=manifest.input,
        sampler=manifest.sampler,
        prior=manifest.prior,
        provenance=manifest.provenance,
        capabilities=manifest.capabilities,
        licence=manifest.licence,
        **engine_info,
        alpha=s.alpha,
        ood_score=score_words(manifest, calibration),
        calibration=calibration_info(served),
        drift=drift_info(drift),
        limits=LimitsInfo(
            body_bytes=s.max_body,
            image_bytes=s.max_image_bytes,
            image_pixels=s.max_pixels,
            jpeg_pixels=ImageLimits(max_pixels=s.max_pixels, jpeg_draft=s.jpeg_draft and manifest.input.averages).max_jpeg_pixels,
            formats=accepted(),
            images=s.max_images,
            n=s.max_samples,
            steps=steps,
            n_times_steps=s.max_work,
            scale=s.max_scale,
            chains=s.generate_chains,
            backlog_seconds=s.generate_backlog,
            client=client,
        ),
        load=load,
        refresh=Refresh(**refresh),
        metrics=served.metrics,
        version=__version__,
    )
