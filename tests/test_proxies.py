"""Behind a proxy and before browsers: root path, CORS, Origin, Host, headers of every response, draining, and the real nginx."""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from urllib.parse import urljoin, urlsplit

import httpx2
import pytest

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.read.browsers import check, matches
from ebjdat_serve.server.settings import SHIPPED, Settings
from tests.conftest import ROOT, free_port, serving, until

PAGE = "https://page.example"
STRANGER = "https://stranger.example"
PROXIES = ROOT / "docs" / "proxies"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A server under a path prefix, for one web page and two host names."""
    options = ("--root-path", "/ebjdat/", "--cors-origin", PAGE, "--allowed-host", "127.0.0.1", "--allowed-host", "*.example.org")
    with serving(SHIPPED, tmp_path_factory.mktemp("published") / "log", "--device", "cpu", "--max-steps", "80", *options) as server:
        yield server


# path prefix ---------------------------------------------------------------------------------------------------------


def test_a_prefix_is_in_every_address_that_is_told_whether_the_proxy_takes_it_off_or_not(published, picture):
    for prefix in ("", "/ebjdat"):
        url = f"{published.url}{prefix}"
        assert httpx2.get(f"{url}/health").status_code == 200
        assert httpx2.get(f"{url}/").json()["paths"][0] == "/ebjdat/classify"
        assert httpx2.post(f"{url}/classify", content=picture).status_code == 200
        assert httpx2.get(f"{url}/openapi.json").json()["servers"] == [{"url": "/ebjdat"}]
        assert "see /ebjdat/docs" in httpx2.get(f"{url}/nowhere").json()["detail"]
        refused = httpx2.get(f"{url}/classify")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
        for page in ("docs", "redoc"):
            assert_page_loads(f"{url}/{page}")
    assert httpx2.get(f"{published.url}/ebjdatx/health").status_code == 404


def assert_page_loads(url):
    """Assert that everything that a documentation page loads is there."""
    text = httpx2.get(url).text
    loaded = re.findall(r"""(?:src|href|spec-url)="([^"]+)"|url: '([^']+)'""", text)
    assert len(loaded) >= 3
    for address in ("".join(one) for one in loaded):
        assert httpx2.get(urljoin(url, address)).status_code == 200, address


# browsers ------------------------------------------------------------------------------------------------------------


def test_a_page_of_the_list_is_answered_by_preflight_and_read_and_another_is_not(published, picture):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type, x-api-key"}
    allowed = httpx2.options(f"{published.url}/classify", headers={"Origin": PAGE, **asked})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    assert {"Content-Type", "X-API-Key"} <= set(allowed.headers["access-control-allow-headers"].split(", "))
    assert "POST" in allowed.headers["access-control-allow-methods"]
    refused = httpx2.options(f"{published.url}/classify", headers={"Origin": STRANGER, **asked})
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    said = httpx2.post(f"{published.url}/classify", content=picture, headers={"Origin": PAGE, "Sec-Fetch-Site": "cross-site"})
    assert (said.status_code, said.headers["access-control-allow-origin"]) == (200, PAGE)
    wrong = httpx2.post(f"{published.url}/classify", content=b"no image", headers={"Origin": PAGE})
    assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (422, PAGE)  # a page can read what is wrong
    png = httpx2.get(f"{published.url}/generate", params={"class": 3, "steps": 1}, headers={"Origin": PAGE})
    assert "X-Energy" in png.headers["access-control-expose-headers"].split(", ")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Origin": STRANGER}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Origin": "//"}, 403),
        ({"Origin": STRANGER, "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://other.example.org", "Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "https://api.example.org", "Sec-Fetch-Site": "same-origin"}, 200),  # also where a proxy has changed Host
        ({"Origin": PAGE}, 200),
        ({"Origin": "self"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 403),  # a form
        ({"Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_a_simple_post_of_another_site_is_refused(published, picture, headers, status):
    if headers.get("Origin") == "self":
        headers = {"Origin": published.url}  # a browser that sends no Sec-Fetch-Site
    answer = httpx2.post(
        f"{published.url}/classify", content=picture, headers={"Content-Type": "text/plain", **headers} if status == 403 else headers
    )
    assert answer.status_code == status
    if status == 403:
        assert "--cors-origin" in answer.json()["detail"]


IMAGE = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
LINK = {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Sec-Fetch-Site": "cross-site", **IMAGE}, 403),
        ({"Sec-Fetch-Site": "same-site", **IMAGE}, 403),
        ({"Sec-Fetch-Site": "same-origin", **IMAGE}, 200),  # on a page of this server
        ({"Sec-Fetch-Site": "cross-site", **LINK}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Purpose": "prefetch;prerender", **LINK}, 403),
        ({"Sec-Fetch-Site": "none", **LINK}, 200),  # typed, or from a bookmark
        ({"Sec-Fetch-Site": "cross-site", **LINK, "Sec-Fetch-Dest": "iframe"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": STRANGER, "Sec-Fetch-Mode": "cors"}, 403),
        ({"Origin": STRANGER}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": PAGE, "Sec-Fetch-Mode": "cors"}, 200),  # <img crossorigin>, fetch
    ],
)
def test_a_page_of_another_site_has_nothing_drawn_but_a_link_is_followed(published, method, headers, status):
    for path in ("/generate?class=3&steps=1", "/info", "/docs"):
        answer = httpx2.request(method, f"{published.url}{path}", headers=headers)
        assert answer.status_code == status, path
        assert httpx2.request(method, f"{published.url}/health", headers=headers).status_code == 200  # it costs nothing
        if status == 403 and method == "GET":
            assert "--cors-origin" in answer.json()["detail"]


def test_without_a_list_pages_of_other_sites_are_refused_too(live, picture):
    assert httpx2.post(f"{live.url}/classify", content=picture, headers={"Origin": PAGE}).status_code == 403
    assert httpx2.post(f"{live.url}/classify", content=picture, headers={"Origin": live.url}).status_code == 200
    assert httpx2.options(f"{live.url}/classify", headers={"Origin": PAGE, "Access-Control-Request-Method": "POST"}).status_code == 405


def test_a_request_for_another_host_is_refused_but_a_probe_is_answered(published, picture):
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    for host, status in (
        ("api.example.org", 200),
        ("API.example.org:8080", 200),
        ("api.example.org.", 200),  # the whole name
        ("api.example.org.:8080", 200),
        ("evil.example", 421),
        ("example.org.evil", 421),
        ("api.example.org..", 421),
    ):
        preflight = httpx2.options(f"{published.url}/classify", headers={"Host": host, **asked})
        assert (preflight.status_code, "access-control-allow-origin" in preflight.headers) == (status, status == 200), host
        assert httpx2.post(f"{published.url}/classify", content=picture, headers={"Host": host}).status_code == status, host
        assert httpx2.get(f"{published.url}/health", headers={"Host": host}).status_code == 200


def test_host_names_match_with_and_without_ports():
    assert matches("[::1]:8000", "[::1]")
    assert matches("localhost:8000", "localhost:8000")
    assert matches("localhost.:8000", "localhost:8000")
    assert matches("example.org", "example.org.")
    assert not matches("localhost", "localhost:8000")
    assert not matches("localhost:8001", "localhost:8000")
    assert not matches("example.org", "*.example.org")
    assert not matches("badexample.org", "*.example.org")


@pytest.mark.parametrize(
    "setting",
    [{"cors_origin": ("example.org",)}, {"cors_origin": ("https://example.org/page",)}, {"cors_origin": ("null",)}]
    + [{"allowed_host": (host,)} for host in ("https://example.org", "a/b", "", "host:port")],
)
def test_what_is_no_origin_or_host_is_named(setting):
    with pytest.raises(EbjdatError, match=r"--cors-origin must be|--allowed-host must be"):
        check(Settings(**setting))


# headers of every response -------------------------------------------------------------------------------------------


def test_every_response_has_the_headers(live, picture):
    answers = [
        httpx2.post(f"{live.url}/classify", content=picture),
        httpx2.post(f"{live.url}/classify", content=b"no image"),
        httpx2.get(f"{live.url}/nowhere"),
        httpx2.put(f"{live.url}/classify"),
        httpx2.get(f"{live.url}/health"),
        httpx2.get(f"{live.url}/docs"),
        httpx2.get(f"{live.url}/openapi.json"),
        httpx2.get(f"{live.url}/generate", params={"class": 3, "steps": 1}),
        httpx2.get(f"{live.url}/generate", params={"class": 3, "steps": 1, "stream": "true"}),
        httpx2.post(f"{live.url}/classify", content=picture, headers={"Origin": STRANGER}),
    ]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store", answer.url
    assert "frame-ancestors 'none'" in answers[5].headers["content-security-policy"]


def test_errors_are_documented_as_the_problem_documents_they_are(live):
    for operations in httpx2.get(f"{live.url}/openapi.json").json()["paths"].values():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and status != "503":
                    assert set(response["content"]) == {"application/problem+json"}, (operation["description"], status)


# draining ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_health_answers_503_first_while_requests_are_served_then_connections_end(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-workers", "0", "--drain-delay", "6") as server:
        kept = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=20)
        kept.request("POST", "/classify", picture)
        first = kept.getresponse()
        assert (first.read() and first.status, first.getheader("connection")) == (200, None)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{server.url}/health").status_code == 503, 3)
        assert httpx2.get(f"{server.url}/health").json() == {"status": "stopping"}
        kept.request("POST", "/classify", picture)
        last = kept.getresponse()
        assert (last.read() and last.status, last.getheader("connection")) == (200, "close")  # a balancer takes another
        assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200  # and so do new ones
        assert server.process.wait(20) == 0
        assert time.monotonic() - began > 5


def refused(server):
    try:
        with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=2):
            return False
    except ConnectionRefusedError:
        return True


@pytest.mark.slow
def test_a_second_signal_ends_the_delay_and_cuts_nobody_off(tmp_path):
    options = ("--device", "cpu", "--classify-workers", "1", "--drain-delay", "60", "--max-steps", "80")
    with serving(SHIPPED, tmp_path / "log", *options) as server, httpx2.Client() as client:
        query = {"class": 3, "steps": 80, "n": 16, "stream": "true", "every": 20}
        with client.stream("GET", f"{server.url}/generate", params=query, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx2.get(f"{server.url}/health").status_code == 503, 3)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: refused(server), 5)  # not left waiting for a process that listens and never answers
            events = [line for line in lines if line.startswith("event: ")]
        assert events[-1] == "event: done"
        assert server.process.wait(20) == 0


# the real ones -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def nginx(folder, server):
    """The real nginx with the configuration of the documentation, between its ports and ours."""
    port = free_port()
    text = (PROXIES / "nginx.conf").read_text(encoding="utf-8")
    text = text.replace("127.0.0.1:8000", urlsplit(server.url).netloc).replace("listen 8080", f"listen 127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder / kind}; " for kind in kinds)
    text = f"user root;\nmaster_process off;\ndaemon off;\npid {folder}/pid;\n" + text.replace("http {", f"http {{ access_log off; {paths}")
    (folder / "nginx.conf").write_text(text, encoding="utf-8")
    command = [shutil.which("nginx"), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        url = f"http://127.0.0.1:{port}/ebjdat"

        def ready():
            assert process.poll() is None, (folder / "error.log").read_text(encoding="utf-8")
            with contextlib.suppress(httpx2.TransportError):
                return httpx2.get(f"{url}/health").status_code == 200
            return False

        try:
            until(ready, 20)
            yield url
        finally:
            process.terminate()


@pytest.mark.skipif(not shutil.which("nginx"), reason="needs nginx: apt-get install nginx")
def test_the_documented_nginx_passes_everything_on(published, tmp_path, picture):
    with nginx(tmp_path, published) as url:
        assert httpx2.post(f"{url}/classify", content=picture).json() == httpx2.post(f"{published.url}/classify", content=picture).json()
        assert_page_loads(f"{url}/docs")
        assert httpx2.head(f"{url}/info").status_code == 200
        assert httpx2.post(f"{url}/classify", content=b"no image").headers["content-type"] == "application/problem+json"
        host = urlsplit(url).netloc
        assert httpx2.post(f"{url}/classify", content=picture, headers={"Origin": f"http://{host}"}).status_code == 200  # its own page
        assert httpx2.post(f"{url}/classify", content=picture, headers={"Origin": STRANGER}).status_code == 403
        assert httpx2.get(f"{url}/info", headers={"Host": "evil.example"}).status_code == 421
        assert httpx2.post(f"{url}/classify", content=bytes(23 * 2**20)).status_code == 413
        query = {"class": 3, "steps": 80, "n": 4, "stream": "true"}
        with httpx2.stream("GET", f"{url}/generate", params=query, timeout=60) as stream:  # each event as it is made
            came = [(time.monotonic(), line) for line in stream.iter_lines() if line.startswith("data: ")]
        assert came[-1][0] - came[0][0] > 0.1
        assert json.loads(came[-1][1].removeprefix("data: "))["images"]
        with httpx2.Client() as client:  # one connection to nginx, those to the server are kept
            assert {client.get(f"{url}/health").status_code for _ in range(50)} == {200}


@pytest.mark.skipif(not shutil.which("caddy"), reason="needs Caddy: apt-get install caddy")
def test_the_documented_caddyfile_is_one(tmp_path):
    command = [shutil.which("caddy"), "validate", "--adapter", "caddyfile", "--config", str(PROXIES / "Caddyfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"HOME": str(tmp_path), "PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr


def test_the_documented_proxies_close_connections_before_the_server_does():
    for name, setting in (("nginx.conf", r"keepalive_timeout (\d+)s"), ("Caddyfile", r"keepalive (\d+)s")):
        (kept,) = re.findall(setting, (PROXIES / name).read_text(encoding="utf-8"))
        assert int(kept) < Settings().keep_alive
    assert Settings().keep_alive > 60
