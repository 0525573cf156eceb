"""What is counted and logged of each request, when it is over."""

import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ebjdat_serve.logs import now
from ebjdat_serve.server.line_log import LineLog, rotating, write_whole
from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.tallies import Histogram
from ebjdat_serve.server.trace import Trace

ASGI = Callable[[Any, Any, Any], Awaitable[None]]
REASONS = {
    400: "malformed",
    401: "key",
    403: "scope",
    404: "not found",
    405: "method",
    408: "slow",
    409: "capability",
    413: "too large",
    414: "too large",
    415: "type",
    417: "malformed",
    421: "host",
    422: "invalid",
    429: "limit",
    431: "too large",
    499: "left",
    500: "error",
    503: "busy",
    504: "deadline",
}
"""Why a request was not answered, by status."""
QUIET = ("/health", "/metrics", "/v2/health/live", "/v2/health/ready", "/v2/ready")
"""Routes whose answers are not logged unless they are errors: probes ask every second."""


@dataclass
class Unrouted:
    """Requests that no model answered: wrong paths, keys and hosts."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)  # by route and code
    durations: defaultdict[str, Histogram] = field(default_factory=lambda: defaultdict(Histogram))  # by route


class Observer:
    """Counts requests by model and version, and writes the access log and the audit log."""

    def __init__(self, settings: Settings) -> None:
        """Raise EbjdatError for an audit log that cannot be written."""
        self.unrouted, self.rejected = Unrouted(), Counter[str]()
        wanted = settings.access_log if settings.access_log is not None else settings.log == "json"
        self.access = LineLog(write_line, "the access log") if wanted else None
        self.json = settings.log == "json"
        self.audit: LineLog | None = None
        if settings.audit_log:
            self.audit = rotating(settings.audit_log, settings.audit_log_bytes, settings.audit_log_files)

    def finish(self, trace: Trace) -> None:
        """Count a request that is over, and log it."""
        seconds, code = time.monotonic() - trace.began, trace.refused or trace.status or 500
        if trace.service is None or trace.model is None:
            self.unrouted.requests[trace.route or "other", code] += 1
            self.unrouted.durations[trace.route or "other"].add(seconds)
        else:
            tally = trace.service.tally(trace.model)
            tally.requests[trace.route, code] += 1
            tally.durations[trace.route].add(seconds)
            if code < 400:
                tally.answered[trace.route] += seconds
            if trace.decode:
                tally.decode.add(trace.decode)
        if code >= 400 and not trace.refused and trace.route not in QUIET:  # problems.refused has those; a probe is no request
            self.rejected[REASONS.get(code, "other")] += 1
        if self.access and (code >= 400 or trace.route not in QUIET):
            self.access.put(self._line(trace, code, seconds))

    def _line(self, trace: Trace, code: int, seconds: float) -> str:
        """Return what the access log says of a request: never a picture, a key or a query."""
        row: dict[str, Any] = {
            "id": trace.id,
            "trace": trace.trace_id,
            "method": trace.method,
            "route": trace.route or "other",
            "code": code,
        }
        row["seconds"] = round(seconds, 6)
        for name in ("decode", "queue", "compute"):
            if spent := getattr(trace, name):
                row[f"{name}_seconds"] = round(spent, 6)
        if trace.service is not None and trace.model is not None:
            row |= {"model": trace.service.name, "version": trace.model.bundle.manifest.version}
        if trace.images:
            row["images"] = trace.images
        if trace.decisions:
            row["decisions"] = trace.decisions
        if trace.key:
            row["key"] = trace.key
        if self.json:
            return json.dumps({"time": now(), "level": "info", "logger": "ebjdat_serve.access", "message": "request", **row})
        return " ".join([now(), *(f"{name}={json.dumps(value) if isinstance(value, list) else value}" for name, value in row.items())])

    def audited(self, trace: Trace, predictions: Predictions, labels: list[str], reasons: list[list[str]] | None) -> None:
        """Write a line for each image: who asked, its sha256, and what was answered with which version."""
        assert self.audit
        about = {"id": trace.id, "route": trace.route, "key": trace.key, "model": trace.service.name}
        about |= {"version": trace.model.bundle.manifest.version, "sha256_model": trace.model.key}
        about |= {"precision": trace.service.settings.precision, "sha256_scores": trace.model.scored_by or None}
        about |= {"calibration": trace.model.calibration_name if trace.model.calibration else None}
        p = predictions
        for i, digest in enumerate(trace.digests):
            top = int(p.top[i, 0])
            scores = {name: finite(getattr(p, name)[i]) for name in ("energy", "suspicion", "p_value", "margin")}
            row = {"time": now(), **about, "sha256": digest, "class": top, "label": labels[top]}
            row |= {"probability": finite(p.probability[i, top]), **scores, "decision": trace.decisions[i] if trace.decisions else None}
            self.audit.put(json.dumps(row | ({"reasons": reasons[i]} if reasons else {})))


def finite(value: Any) -> float | None:
    """Return a number as JSON has it, None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


def write_line(line: str) -> None:
    """Write a line to standard output."""
    write_whole(sys.stdout.fileno(), line)


class TraceMiddleware:
    """Gives each request an identity, in ``scope["trace"]``, returns it in headers, and tells the observer when the request is over."""

    def __init__(self, app: ASGI, observer: Observer) -> None:
        self._app, self._observer = app, observer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, and its response back with the headers."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        trace = scope["trace"] = Trace.of(scope["method"], scope["headers"])

        async def send_traced(message: Any) -> None:
            if message["type"] == "http.response.start":
                trace.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *trace.headers]}
            await send(message)

        try:
            await self._app(scope, receive, send_traced)
        finally:
            self._observer.finish(trace)
