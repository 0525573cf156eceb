"""The identity of a request, and what is noted of it on its way: X-Request-ID and W3C Trace Context (traceparent)."""

import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
"""What is taken for a request's id; anything else, such as what would need an escape in a log, is replaced by one of ours."""
TRACEPARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


@dataclass(slots=True)
class Trace:
    """A request: its id, its place in a trace, and what is noted of it; times are in seconds."""

    id: str
    trace_id: str
    span_id: str  # of this server's part
    flags: str
    method: str = ""
    began: float = field(default_factory=time.monotonic)
    route: str = ""  # the path of the endpoint, "" for none
    status: int = 0  # of the response that the app gave
    refused: int = 0  # of the one that the connection gave in its place
    service: Any = None  # the Service that answers, None for none
    model: Any = None  # the ServedModel that answers
    key: str = ""  # the name of the API key
    images: int = 0
    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0
    decisions: list[str | None] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)  # sha256 of the images as they were sent, for the audit log

    @staticmethod
    def of(method: str, headers: Iterable[tuple[bytes, bytes]]) -> "Trace":
        """Return the trace of a request: with its own id and trace where it has valid ones, else with new ones."""
        sent_id = parent = b""
        for name, value in headers:
            if name == b"x-request-id":
                sent_id = value
            elif name == b"traceparent":
                parent = value
        fresh = secrets.token_hex(40)  # once: each call asks the system
        found = TRACEPARENT.fullmatch(parent) if parent else None
        trace_id, flags = (found[1].decode(), found[3].decode()) if found else (fresh[:32], "00")
        request_id = sent_id.decode() if REQUEST_ID.fullmatch(sent_id) else fresh[32:64]
        return Trace(request_id, trace_id, fresh[64:], flags, method)

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return what tells the client of the request's identity."""
        return [(b"x-request-id", self.id.encode()), (b"traceparent", self.traceparent.encode())]

    @property
    def traceparent(self) -> str:
        """Return this server's part as the parent of what follows."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags}"
