"""/metrics, for Prometheus."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fastapi import Request, Response
from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from ebjdat_serve.keys import Scope
from ebjdat_serve.server.answer.status import DriftInfo, drift_info
from ebjdat_serve.server.endpoints.endpoint import Endpoint, Service, Shared
from ebjdat_serve.server.line_log import log_lines_lost
from ebjdat_serve.server.observer import REASONS
from ebjdat_serve.server.problems import refused
from ebjdat_serve.server.read.http_protocol import connections
from ebjdat_serve.server.tallies import Histogram, QueueTally, Tally

PROCESS = ProcessCollector(registry=None)
"""Memory, processor time and descriptors of the HTTP process."""
Labels = tuple[str, ...]
MODEL = ("model", "version")


class Families:
    """Metrics under construction; values of the same labels are added, as of two builds of one version."""

    def __init__(self) -> None:
        self._about: dict[str, tuple[type[Any], str, Labels]] = {}
        self._values: dict[str, dict[Labels, Any]] = {}

    def declare(self, kind: type[Any], name: str, text: str, labels: Labels) -> None:
        """Declare a metric, which is written also without a value."""
        self._about[name], self._values[name] = (kind, text, labels), {}

    def add(self, name: str, labels: Labels, value: float) -> None:
        """Add to a counter or a gauge."""
        here = self._values[name]
        here[labels] = here.get(labels, 0) + value

    def observe(self, name: str, labels: Labels, histogram: Histogram) -> None:
        """Add a histogram."""
        if (sum_ := self._values[name].get(labels)) is None:
            sum_ = self._values[name][labels] = Histogram(histogram.bounds)
        sum_.counts = [a + b for a, b in zip(sum_.counts, histogram.counts, strict=True)]
        sum_.total += histogram.total

    def collect(self) -> Iterator[Metric]:
        """Yield each metric."""
        for name, (kind, text, labels) in self._about.items():
            family = kind(name, text, labels=labels)
            for values, value in self._values[name].items():
                if isinstance(value, Histogram):
                    family.add_metric(values, buckets(value), value.total)
                else:
                    family.add_metric(values, value)
            yield family


def buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Return cumulative counts by upper bounds."""
    found, total = [], 0
    for bound, n in zip([*map(repr, histogram.bounds), "+Inf"], histogram.counts, strict=True):
        found.append((bound, float(total := total + n)))
    return found


COUNTERS: list[tuple[str, str, Labels]] = [
    ("ebjdat_requests", "Requests answered.", ("route", "code", *MODEL)),
    ("ebjdat_rejected", "Requests that were refused, by reason.", ("reason",)),
    ("ebjdat_images", "Images classified.", MODEL),
    ("ebjdat_suspicious", "Images flagged: p-value below alpha.", MODEL),
    ("ebjdat_decisions", "Decisions: accept or review.", ("decision", *MODEL)),
    ("ebjdat_predicted", "Images by predicted class.", ("class", *MODEL)),
    ("ebjdat_chain_steps", "Steps of Langevin chains, and gradients that count as such.", ("model",)),
    ("ebjdat_worker_restarts", "Workers that died and were started again.", ("model", "kind")),
    ("ebjdat_refresh", "Versions of a store that were looked at.", ("model", "result")),
    ("ebjdat_log_lines_lost", "Lines of the access log, the audit log and the HTTP process's own that could not be written.", ("log",)),
]
HISTOGRAMS: list[tuple[str, str, Labels]] = [
    ("ebjdat_request_duration_seconds", "Time from the head of a request to the end of its response.", ("route", *MODEL)),
    ("ebjdat_decode_duration_seconds", "Time in which a request's images were decoded, waiting included.", MODEL),
    ("ebjdat_queue_duration_seconds", "Time that a request waited for its worker.", ("kind", *MODEL)),
    ("ebjdat_compute_duration_seconds", "Time that a batch, or a job of chains, took in its worker.", ("kind", *MODEL)),
    ("ebjdat_batch_size", "Images of a batch.", ("kind", *MODEL)),
    ("ebjdat_p_value", "p-values of the OOD score.", MODEL),
]
GAUGES: list[tuple[str, str, Labels]] = [
    ("ebjdat_model_info", "1 for the version that is served.", (*MODEL, "engine", "provider", "precision", "sha256")),
    ("ebjdat_ready", "Whether every worker of the model is ready.", ("model",)),
    ("ebjdat_queue_depth", "Requests in progress.", ("model", "kind")),
    ("ebjdat_chains_running", "Langevin chains in progress.", ("model",)),
    ("ebjdat_chain_steps_per_second", "Rate of all workers together.", ("model",)),
    (
        "ebjdat_drift_log_e",
        "Log e-value against traffic like the calibration images; that of urn raises the alarm.",
        (*MODEL, "test"),
    ),
    ("ebjdat_drift_alarm", "1 once the drift test has raised its alarm.", MODEL),
    ("ebjdat_drift_images", "Images that the drift test has seen, also before a restart.", MODEL),
    ("ebjdat_flag_rate", "Share of these images that was flagged.", MODEL),
    ("ebjdat_flag_rate_low", "Lower bound of its rate, at all times together 95 %.", MODEL),
    ("ebjdat_flag_rate_high", "Upper bound of its rate, at all times together 95 %.", MODEL),
    ("ebjdat_connections", "Open connections.", ()),
]


def families(shared: Shared) -> Families:
    """Return all metrics of a server as they are now."""
    found = Families()
    kinds: list[tuple[type[Any], list[tuple[str, str, Labels]]]] = [
        (CounterMetricFamily, COUNTERS),
        (HistogramMetricFamily, HISTOGRAMS),
        (GaugeMetricFamily, GAUGES),
    ]
    for kind, declared in kinds:
        for name, text, labels in declared:
            found.declare(kind, name, text, labels)
    observer = shared.observer
    for (route, code), n in observer.unrouted.requests.items():
        found.add("ebjdat_requests", (route, str(code), "", ""), n)
    for route, histogram in observer.unrouted.durations.items():
        found.observe("ebjdat_request_duration_seconds", (route, "", ""), histogram)
    for reason, n in observer.rejected.items():
        found.add("ebjdat_rejected", (reason,), n)
    for code, n in refused.items():
        found.add("ebjdat_rejected", (REASONS.get(code, "other"),), n)
    for name, line_log in (("access", observer.access), ("audit", observer.audit)):
        if line_log:
            found.add("ebjdat_log_lines_lost", (name,), line_log.lost)
    found.add("ebjdat_log_lines_lost", ("server",), log_lines_lost())
    found.add("ebjdat_connections", (), connections())
    for service in shared.services.values():
        of_service(found, service)
    return found


def of_service(found: Families, service: Service) -> None:
    """Add what is counted for one model."""
    name, manager = service.name, service.manager
    for key, tally in service.tallies.items():
        of_version(found, (name, tally.version), tally)
        for queue in service.queues:
            if done := queue.tallies.get(key):
                of_queue(found, (queue.kind, name, tally.version), done)
    for queue in service.queues:
        found.add("ebjdat_queue_depth", (name, queue.kind), queue.active)
        found.add("ebjdat_worker_restarts", (name, queue.kind), queue.restarts)
    if chains := service.generate_queue:
        found.add("ebjdat_chains_running", (name,), chains.chains)
        found.add("ebjdat_chain_steps", (name,), chains.steps)
        found.add("ebjdat_chain_steps_per_second", (name,), chains.rate)
    for result, n in manager.refreshes.items():
        found.add("ebjdat_refresh", (name, result), n)
    found.add("ebjdat_ready", (name,), manager.ready())
    engine = manager.engine_info()
    about = (engine.get("engine", ""), engine.get("provider", ""), engine.get("precision", ""), manager.active.key)
    version = manager.active.bundle.manifest.version
    found.add("ebjdat_model_info", (name, version, *about), 1)
    if drift := drift_info(service.drift(manager.active)):  # of the version that is served alone
        of_drift(found, (name, version), drift)


def of_drift(found: Families, model: Labels, drift: DriftInfo) -> None:
    """Add what the drift test says."""
    found.add("ebjdat_drift_log_e", (*model, "urn"), drift.log_e)
    found.add("ebjdat_drift_log_e", (*model, "jumper"), drift.jumper_log_e)
    found.add("ebjdat_drift_alarm", model, bool(drift.alarm))
    found.add("ebjdat_drift_images", model, drift.images)
    found.add("ebjdat_flag_rate", model, drift.flagged.rate)
    found.add("ebjdat_flag_rate_low", model, drift.flagged.low)
    found.add("ebjdat_flag_rate_high", model, drift.flagged.high)


def of_version(found: Families, model: Labels, tally: Tally) -> None:
    """Add what was answered with one version."""
    for (route, code), n in tally.requests.items():
        found.add("ebjdat_requests", (route, str(code), *model), n)
    for route, histogram in tally.durations.items():
        found.observe("ebjdat_request_duration_seconds", (route, *model), histogram)
    found.observe("ebjdat_decode_duration_seconds", model, tally.decode)
    found.add("ebjdat_images", model, tally.images)
    found.add("ebjdat_suspicious", model, tally.suspicious)
    found.observe("ebjdat_p_value", model, tally.p_value)
    for index, n in tally.predicted.items():
        found.add("ebjdat_predicted", (tally.labels[index], *model), n)
    for decision, n in tally.decisions.items():
        found.add("ebjdat_decisions", (decision, *model), n)


def of_queue(found: Families, labels: Labels, tally: QueueTally) -> None:
    """Add what a queue did for one version."""
    found.observe("ebjdat_queue_duration_seconds", labels, tally.queue)
    found.observe("ebjdat_compute_duration_seconds", labels, tally.compute)
    found.observe("ebjdat_batch_size", labels, tally.batch)


class Registry:
    """What prometheus-client writes out."""

    def __init__(self, found: Families) -> None:
        self.collect: Callable[[], Iterator[Metric]] = lambda: iter([*found.collect(), *PROCESS.collect()])


async def metrics(service: Service, request: Request) -> Response:
    """Return counters, histograms and gauges for Prometheus, as text or OpenMetrics."""
    found = families(service.shared)  # numbers of one moment; to write them takes milliseconds
    encoder, kind = choose_encoder(request.headers.get("accept", ""))
    text = await asyncio.get_running_loop().run_in_executor(service.encoders, encoder, Registry(found))
    return Response(text, media_type=kind)


CONTENT: Mapping[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "metrics in Prometheus's text format, or OpenMetrics"}
}
SCOPES: tuple[Scope, ...] = ("operate",)
METRICS = Endpoint("/metrics", metrics, method="GET", responses=CONTENT, scopes=SCOPES, per_model=False)
