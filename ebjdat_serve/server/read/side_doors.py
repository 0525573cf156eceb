"""Ways out of HTTP/1.1, refused by the head of a request: upgrades, other protocols, methods, targets and framings."""

from collections.abc import Iterable

from ebjdat_serve.server.problems import Problem

METHODS = {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"}
"""Methods that reach a route; the route says which it takes."""
BODILESS = {b"GET", b"HEAD", b"OPTIONS"}

Headers = Iterable[tuple[bytes, bytes]]


def side_door(version: str, method: bytes, target: bytes, headers: Headers, *, upgrade: bool) -> Problem | None:
    """Return why a request is refused: it leaves HTTP/1.1, or means what no route here could. ``upgrade``: the parser sees one."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name, []).append(value)
    if version not in ("1.1", "1.0"):
        return Problem(400, f"HTTP/{version} is not spoken here; use HTTP/1.1")
    if method not in METHODS:
        allowed = "GET, HEAD, POST, OPTIONS"
        return Problem(405, f"{method.decode('ascii')} is not a method of this server; use {allowed}", headers={"Allow": allowed})
    if b"upgrade" in found or b"http2-settings" in found or upgrade:
        return Problem(400, "no connection is upgraded here, neither to WebSocket nor to HTTP/2; send the request without Upgrade")
    if not target.startswith(b"/"):
        return Problem(400, "the request target must be a path that begins with /; this server is no proxy")
    hosts = len(found.get(b"host", []))
    if hosts > 1 or (version == "1.1" and not hosts):
        return Problem(400, "send one header Host")
    if any(value.lower() != b"100-continue" for value in found.get(b"expect", [])):
        return Problem(417, "the only expectation that is met is 100-continue")
    encodings = found.get(b"transfer-encoding", [])
    if encodings and (version == "1.0" or [value.lower() for value in encodings] != [b"chunked"]):
        return Problem(400, "the only transfer encoding is chunked, of HTTP/1.1")
    if method in BODILESS and (encodings or any(value != b"0" for value in found.get(b"content-length", []))):
        return Problem(400, f"{method.decode('ascii')} takes no body")
    return None
