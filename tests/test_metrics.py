"""/metrics, the identity of a request, the access log and the audit log."""

import asyncio
import contextlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from base64 import b64encode
from hashlib import sha256

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.cli import main
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.scored_by import scored_by
from ebjdat_serve.server import problems
from ebjdat_serve.server.endpoints.metrics import COUNTERS, GAUGES, HISTOGRAMS
from ebjdat_serve.server.line_log import WAITING, LineLog
from ebjdat_serve.server.observer import Observer, TraceMiddleware, finite
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.server.tallies import KEPT, TENTHS, Histogram, Newest, Tally
from ebjdat_serve.server.trace import Trace
from ebjdat_serve.store import publish
from tests.classifiers import images, write
from tests.conftest import DIGITS, HTTP, serving, until


def scraped(url: str, **headers: str) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by name and labels, as a scraper reads them."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    answer = HTTP.get(f"{url}/metrics", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), "a series twice"
            found[sample.name][labels] = sample.value
    return found


def total(values: dict[tuple[tuple[str, str], ...], float], **labels: str) -> float:
    return sum(value for found, value in values.items() if labels.items() <= dict(found).items())


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    home = tmp_path_factory.mktemp("observed")
    publish(write(home / "one", version="1-one"), home / "store")
    options = (
        "--device",
        "cpu",
        "--log",
        "json",
        "--audit-log",
        str(home / "audit"),
        "--audit-log-bytes",
        str(2**16),
        "--refresh-interval",
        "0.1",
    )
    with serving(DIGITS, home / "server.log", *options, more=(f"tiny={home / 'store'}",)) as server:
        yield server


@pytest.fixture(scope="module")
def pngs() -> list[bytes]:
    return [encode_png(image) for image in images(3, (12, 10), 3)]


def test_what_is_asked_is_counted_by_route_code_model_and_version(observed, pngs):
    before = scraped(observed.url)
    version = Bundle.load(DIGITS).manifest.version
    for png in pngs:
        assert HTTP.post(f"{observed.url}/classify", content=png).status_code == 200
    assert HTTP.post(f"{observed.url}/models/tiny/classify", content=pngs[0]).status_code == 200
    assert HTTP.post(f"{observed.url}/classify", content=b"no image").status_code == 422
    assert HTTP.get(f"{observed.url}/nowhere").status_code == 404
    assert HTTP.get(f"{observed.url}/generate?class=1&n=2&steps=3").status_code == 200
    after = scraped(observed.url)

    def gained(name: str, **labels: str) -> float:
        return total(after[name], **labels) - total(before.get(name, {}), **labels)

    mine = {"model": Bundle.load(DIGITS).manifest.name, "version": version}
    assert gained("ebjdat_requests_total", route="/classify", code="200", **mine) == 3
    assert gained("ebjdat_requests_total", route="/classify", code="422", **mine) == 1
    assert gained("ebjdat_requests_total", route="/classify", code="200", model="tiny", version="1-one") == 1
    assert gained("ebjdat_requests_total", route="other", code="404", model="") == 1
    assert gained("ebjdat_images_total", **mine) == 3
    assert gained("ebjdat_predicted_total", **mine) == 3
    assert gained("ebjdat_p_value_count", **mine) == gained("ebjdat_decisions_total", **mine) == 3
    assert gained("ebjdat_p_value_bucket", le="1.0", **mine) == 3
    assert gained("ebjdat_p_value_count", model="tiny") == 0  # it is not calibrated
    assert gained("ebjdat_rejected_total", reason="invalid") == 1
    assert gained("ebjdat_rejected_total", reason="not found") == 1
    assert gained("ebjdat_request_duration_seconds_count", route="/classify", **mine) == 4
    assert gained("ebjdat_decode_duration_seconds_count", **mine) == 3
    assert 1 <= gained("ebjdat_compute_duration_seconds_count", kind="classify", **mine) <= 3
    assert gained("ebjdat_queue_duration_seconds_count", kind="classify", **mine) == 3
    assert gained("ebjdat_batch_size_sum", kind="classify", **mine) == 3
    assert gained("ebjdat_queue_duration_seconds_count", kind="generate", **mine) == 1
    assert 0 < gained("ebjdat_request_duration_seconds_sum", route="/classify", **mine) < 60
    until(lambda: total(scraped(observed.url)["ebjdat_chain_steps_total"], **{"model": mine["model"]}) >= 6)


def test_every_declared_metric_is_written_and_has_a_base_unit(observed):
    names = {family.name for family in text_string_to_metric_families(HTTP.get(f"{observed.url}/metrics").text)}
    assert {name for name, _, _ in [*COUNTERS, *HISTOGRAMS, *GAUGES]} <= names
    assert "process_resident_memory_bytes" in names
    assert not [name for name in names if name.endswith(("_ms", "_milliseconds", "_mb"))]
    openmetrics = HTTP.get(f"{observed.url}/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert openmetrics.text.endswith("# EOF\n")


def test_a_refresh_is_counted_and_the_model_served_is_named(observed, tmp_path, pngs):
    store = observed.log.parent / "store"
    publish(write(tmp_path / "two", version="2-two"), store)
    until(lambda: HTTP.get(f"{observed.url}/models/tiny/info").json()["model"].endswith("@2-two"))
    HTTP.post(f"{observed.url}/models/tiny/classify", content=pngs[0])
    found = scraped(observed.url)
    assert total(found["ebjdat_refresh_total"], model="tiny", result="served") == 1
    assert total(found["ebjdat_model_info"], model="tiny", version="2-two") == 1
    assert total(found["ebjdat_model_info"], model="tiny", version="1-one") == 0
    assert total(found["ebjdat_requests_total"], model="tiny", version="2-two", code="200") >= 1


def test_ids_are_taken_made_and_returned(observed):
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    answer = HTTP.get(f"{observed.url}/health", headers={"X-Request-ID": "order-17", "traceparent": parent})
    assert answer.headers["x-request-id"] == "order-17"
    ours = re.fullmatch(r"00-4bf92f3577b34da6a3ce929d0e0e4736-([0-9a-f]{16})-01", answer.headers["traceparent"])
    assert ours
    assert ours[1] != "00f067aa0ba902b7"
    one, two = (HTTP.get(f"{observed.url}/nowhere").headers for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", one["x-request-id"])
    assert one["x-request-id"] != two["x-request-id"]
    assert one["traceparent"][3:35] != two["traceparent"][3:35]


@pytest.mark.parametrize(
    "name, value",
    [
        (b"x-request-id", b"a b"),
        (b"x-request-id", b'x","level":"error'),
        (b"x-request-id", b"a" * 129),
        (b"x-request-id", b"\xff"),
        (b"traceparent", b"00-" + b"0" * 32 + b"-00f067aa0ba902b7-01"),
        (b"traceparent", b"00-4bf92f3577b34da6a3ce929d0e0e4736-" + b"0" * 16 + b"-01"),
        (b"traceparent", b"ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        (b"traceparent", b"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01"),
    ],
)
def test_an_id_that_a_log_could_not_hold_as_it_is_gets_one_of_ours(name, value):
    trace = Trace.of("GET", [(name, value)])
    assert re.fullmatch("[0-9a-f]{32}", trace.id)
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", trace.traceparent)
    assert trace.trace_id.encode() not in value


def test_a_line_for_each_request_says_who_what_and_when_but_no_picture(observed, pngs):
    HTTP.post(f"{observed.url}/classify?check=none", content=pngs[0], headers={"X-Request-ID": "find-me"})

    def found():
        rows = [json.loads(line) for line in observed.log.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row.get("id") == "find-me"]

    until(found)
    (row,) = found()
    manifest = Bundle.load(DIGITS).manifest
    assert (row["route"], row["code"], row["model"], row["version"]) == ("/classify", 200, manifest.name, manifest.version)
    assert row["decisions"] in (["accept"], ["review"])
    assert 0 < row["compute_seconds"] + row["queue_seconds"] + row["decode_seconds"] < row["seconds"] < 30
    assert not re.search(r'"route": "/health", "code": 200', observed.log.read_text(encoding="utf-8"))


def test_the_audit_log_has_the_hash_of_what_was_sent_and_what_was_answered(observed, pngs):
    body = json.dumps({"images": [b64encode(png).decode() for png in pngs[:2]]})
    answer = HTTP.post(
        f"{observed.url}/classify", content=body, headers={"Content-Type": "application/json", "X-Request-ID": "audited"}
    ).json()
    file = observed.log.parent / "audit"

    def rows():
        return [row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if row["id"] == "audited"]

    until(lambda: len(rows()) == 2)
    for row, png, result in zip(rows(), pngs, answer["results"], strict=False):
        assert row["sha256"] == sha256(png).hexdigest()
        assert row["version"] == answer["model"].partition("@")[2]
        assert row["sha256_model"] == Bundle.load(DIGITS).served
        assert row["sha256_scores"] == scored_by(Bundle.load(DIGITS), "fp32", Bundle.load(DIGITS).combination())
        assert (row["precision"], row["calibration"]) == ("fp32", "images")
        for name in ("class", "label", "decision", "reasons"):
            assert row[name] == result[name], name
        for name in ("probability", "p_value", "suspicion", "energy"):
            assert row[name] == pytest.approx(result[name], rel=1e-6), name
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_numbers_of_the_audit_log_are_json():
    assert [finite(value) for value in (1.5, float("nan"), float("inf"), -float("inf"))] == [1.5, None, None, None]


def test_the_audit_log_has_the_hash_of_the_bytes_of_an_array(observed):
    pixels = images(2, (9, 7))
    array = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": pixels.ravel().tolist()}
    path = f"/v2/models/{Bundle.load(DIGITS).manifest.name}/infer"
    assert HTTP.post(f"{observed.url}{path}", json={"inputs": [array]}, headers={"X-Request-ID": "array"}).status_code == 200
    file = observed.log.parent / "audit"

    def rows():
        return [row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()) if row["id"] == "array"]

    until(lambda: len(rows()) == 2)
    assert [(row["sha256"], row["route"]) for row in rows()] == [(sha256(one.tobytes()).hexdigest(), "/v2/infer") for one in pixels]


def test_the_audit_log_is_replaced_when_it_is_full(observed, pngs):
    body = json.dumps({"images": [b64encode(pngs[0]).decode()] * 60})
    for _ in range(4):  # some 30 kB each
        assert HTTP.post(f"{observed.url}/classify", content=body, headers={"Content-Type": "application/json"}).status_code == 200
    until(lambda: (observed.log.parent / "audit.1").exists())
    assert (observed.log.parent / "audit.1").stat().st_size <= 2**16
    for line in (observed.log.parent / "audit.1").read_text(encoding="utf-8").splitlines():
        json.loads(line)


def test_an_audit_log_that_cannot_be_written_ends_the_start_in_one_line(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ebjdat_serve.cli",
        "serve",
        str(SHIPPED),
        "--port",
        "8765",
        "--audit-log",
        str(tmp_path / "none" / "audit"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "the audit log" in done.stderr


def test_lines_that_cannot_be_taken_are_counted_and_the_caller_never_waits():
    gate, written = threading.Event(), []

    def write_slowly(line: str) -> None:
        gate.wait(10)
        if line == "bad":
            raise OSError("disk full")
        written.append(line)

    lines = LineLog(write_slowly, "a log")
    lines.put("bad")
    for i in range(WAITING + 5):
        lines.put(str(i))
    assert 4 <= lines.lost <= 6  # of WAITING + 6; the thread may have taken the first
    gate.set()
    lines.close(10)
    assert len(written) + lines.lost == WAITING + 6


def test_buckets_are_inclusive_and_cumulative():
    histogram = Histogram(TENTHS)
    for value in (0.05, 0.1, 0.1000001, 1.0):
        histogram.add(value)
    assert histogram.counts == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert histogram.total == pytest.approx(1.2500001)


def test_counts_of_many_versions_do_not_pile_up():
    tallies = Newest[Tally]()
    first = tallies.of("first", lambda: Tally("first", []))
    for i in range(KEPT + 3):
        tallies.of(str(i), lambda i=i: Tally(str(i), []))
        assert tallies.of("first", lambda: Tally("anew", [])) is first  # which is used all the time: a version that is served again
    assert set(tallies) == {"first", *(str(i) for i in range(4, KEPT + 3))}


def test_a_request_that_its_connection_refuses_is_counted_once_and_as_that(observed):
    """The app hears that its client has left, and would count 499."""
    before = scraped(observed.url)
    address = observed.url.removeprefix("http://").split(":")
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nX-Request-ID: midway\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection((address[0], int(address[1]))) as client:
        client.sendall(head + b"4\r\nabcd\r\n")
        time.sleep(0.3)
        client.sendall(b"zz\r\n")
        assert b" 400 " in client.recv(4096)
    until(lambda: total(scraped(observed.url)["ebjdat_requests_total"], code="400") > total(before["ebjdat_requests_total"], code="400"))
    after = scraped(observed.url)

    def gained(name, **labels):
        return total(after.get(name, {}), **labels) - total(before.get(name, {}), **labels)

    assert gained("ebjdat_requests_total", code="499") == 0
    assert gained("ebjdat_rejected_total") == gained("ebjdat_rejected_total", reason="malformed") == 1
    until(lambda: '"id": "midway"' in observed.log.read_text(encoding="utf-8"))
    (row,) = [row for row in map(json.loads, observed.log.read_text(encoding="utf-8").splitlines()) if row.get("id") == "midway"]
    assert row["code"] == 400


def test_a_probe_that_finds_a_model_not_ready_is_no_refused_request():
    observer = Observer(Settings())
    for route in ("/health", "/v2/health/ready", "/classify"):
        observer.finish(Trace("a", "b", "c", "00", route=route, status=503))
    assert dict(observer.rejected) == {"busy": 1}


def test_an_answer_to_a_fault_of_the_server_has_the_id(tmp_path):
    app, sent = FastAPI(), []
    problems.install(app, Settings())
    app.add_middleware(TraceMiddleware, observer=Observer(Settings()))

    @app.get("/fault")
    async def fault() -> None:
        raise RuntimeError("a fault")

    async def ask():
        scope = {"type": "http", "method": "GET", "path": "/fault", "raw_path": b"/fault", "query_string": b"", "root_path": ""}
        scope |= {
            "headers": [(b"x-request-id", b"order-17")],
            "http_version": "1.1",
            "scheme": "http",
            "client": ("a", 1),
            "server": ("b", 2),
        }

        async def receive():
            return {"type": "http.request", "body": b""}

        async def send(message):
            sent.append(message)

        with contextlib.suppress(RuntimeError):  # Starlette raises it again, for the server's log
            await app(scope, receive, send)

    asyncio.run(ask())
    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 500
    assert headers[b"x-request-id"] == b"order-17"
    assert headers[b"traceparent"].startswith(b"00-")


def test_lines_after_the_end_are_lost_and_counted():
    written = []
    lines = LineLog(written.append, "a log")
    lines.put("one")
    lines.close(10)
    lines.put("two")
    assert (written, lines.lost) == (["one"], 1)


@pytest.mark.parametrize("option", [("--audit-log", "audit"), ("--drift-state", "state"), ("--access-log",)])
def test_the_stock_mode_does_not_pretend_to_write_what_it_does_not(option, no_start, capsys, tmp_path):
    given = [option[0], *(str(tmp_path / name) for name in option[1:])]
    assert main(["serve", str(SHIPPED), "--stock", *given]) == 2
    assert "--stock writes none of" in capsys.readouterr().err
