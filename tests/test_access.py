"""Keys, clients and limits on live servers, over HTTP and with real workers."""

import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from ebjdat_serve import cli
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.app import build_server
from ebjdat_serve.server.read.auth import Access
from ebjdat_serve.server.read.auth_failures import FREE
from ebjdat_serve.server.settings import SHIPPED, Settings
from tests.conftest import HTTP, Live, serving, until

PATHS = {
    "/classify": "classify", "/energy": "classify", "/generate": "generate", "/explain": "explain",
    "/info": "operate", "/docs": "operate", "/redoc": "operate", "/openapi.json": "operate",
}  # fmt: skip


def command(*words: str | Path) -> tuple[int, str, str]:
    """Return the status, standard output and standard error of ebjdat-serve."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        status = cli.main([str(word) for word in words])
    return status, out.getvalue(), errors.getvalue()


def new(file: Path, *words: str) -> str:
    status, out, errors = command("key", "new", *words, "--file", file)
    assert status == 0, errors
    return out.strip()


@dataclass
class Keyed(Live):
    file: Path
    secrets: dict[str, str]

    def ask(self, path: str, key: str = "", content: bytes | None = None, **headers: str) -> httpx2.Response:
        """Return the answer for the key named ``key``, or for the text ``key``; none where it is empty."""
        said = {"X-API-Key": self.secrets.get(key, key)} if key else {}
        params = {"class": 3, "steps": 1} if path == "/generate" else {}
        return HTTP.request("POST" if content else "GET", f"{self.url}{path}", content=content, params=params, headers=said | headers)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> Iterator[Keyed]:
    """A server with a key for each scope, LIT_SERVER_API_KEY, and one trusted proxy: this machine."""
    folder = tmp_path_factory.mktemp("keyed")
    file = folder / "keys.json"
    secrets = {
        "shop": new(file, "shop", "--scope", "classify"),
        "draw": new(file, "draw", "--scope", "generate"),
        "why": new(file, "why", "--scope", "explain"),
        "ops": new(file, "ops", "--scope", "operate"),
        "slow": new(file, "slow", "--scope", "classify", "--rate", "0.5", "--burst", "2"),
        "narrow": new(file, "narrow", "--scope", "classify", "--concurrency", "1"),
        "root": "a key of all scopes from the environment",
    }
    options = ("--device", "cpu", "--keys", str(file), "--trusted-proxy", "127.0.0.1", "--client-requests", "4", "--access-log")
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LIT_SERVER_API_KEY", f"{secrets['root']}\n")
            live = stack.enter_context(serving(SHIPPED, folder / "log", *options))
        yield Keyed(**vars(live), file=file, secrets=secrets)


def problem(answer: httpx2.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == status
    return answer.json()["detail"]


# keys and scopes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_a_key_opens_the_paths_of_its_scopes(keyed, picture, path):
    content = picture if PATHS[path] in ("classify", "explain") else None
    scopes = {"shop": "classify", "draw": "generate", "why": "explain", "ops": "operate"}
    for name, scope in scopes.items():
        answer = keyed.ask(path, name, content)
        if scope == PATHS[path]:
            assert answer.status_code == 200
        else:
            assert problem(answer, 403) == f"the key {name} is for {scope}; {path} needs a key for {PATHS[path]}"
            lines = lambda: keyed.log.read_text(encoding="utf-8").splitlines()  # noqa: E731
            until(lambda: any("code=403" in line and line.endswith(f"key={name}") for line in lines()), 5)  # noqa: B023
    assert keyed.ask(path, "root", content).status_code == 200


def test_any_key_sees_the_index_and_nobody_needs_one_for_health(keyed):
    for name in ("shop", "draw", "ops", "root"):
        assert "/classify" in keyed.ask("/", name).json()["paths"]
    assert keyed.ask("/health").json() == {"status": "ok"}
    assert keyed.ask("/health", "wrong").json() == {"status": "ok"}
    assert "API key" in problem(keyed.ask("/"), 401)


@pytest.mark.parametrize("path", ["/nowhere", "//info", "/info/", "/INFO", "/%69nfo/", "/docs-assets/favicon.png", "/classify/../info"])
def test_a_path_that_is_spelt_otherwise_opens_nothing(keyed, path):
    """A raw request: clients normalise paths."""
    host, port = keyed.url.removeprefix("http://").split(":")
    for name, allowed in (("shop", {404}), ("", {401}), ("ops", {200, 404})):
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            said = f"X-API-Key: {keyed.secrets[name]}\r\n" if name else ""
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n{said}Connection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda raw=raw: raw.recv(65536), b""))
        assert int(answer.split()[1]) in allowed, (name, answer[:300])


def test_a_key_is_one_header(keyed, picture):
    known = ("X-API-Key", keyed.secrets["shop"])
    for second in (known, ("x-api-key", "wrong"), ("X-API-Key", "")):
        answer = HTTP.post(f"{keyed.url}/classify", content=picture, headers=[known, second])
        assert problem(answer, 400) == "send one X-API-Key header, not several"
    both = HTTP.post(f"{keyed.url}/classify", content=picture, headers={"X-API-Key": f"{known[1]}, {known[1]}"})
    assert "none of this server's" in problem(both, 401)


@pytest.mark.parametrize("sent", ["", "wrong", "a" * 5000, "é", "ebjdat_", "sha256"])
def test_what_is_no_key_opens_nothing(keyed, picture, sent):
    if sent == "sha256":
        sent = json.loads(keyed.file.read_text())["keys"][0]["sha256"]
    answer = HTTP.post(
        f"{keyed.url}/classify", content=picture, headers={"X-API-Key": sent.encode(), "X-Forwarded-For": f"10.9.0.{len(sent) % 250}"}
    )
    assert "X-API-Key" in problem(answer, 401)
    assert answer.headers["www-authenticate"] == "X-API-Key, Bearer"


def test_a_bearer_is_a_key_of_the_same_scopes(keyed, picture):
    """Prometheus before 3.x, and much else, can send no other header."""
    shop, ops = keyed.secrets["shop"], keyed.secrets["ops"]
    for said in (f"Bearer {ops}", f"bearer  {ops}", f"BEARER {ops}"):
        assert keyed.ask("/info", Authorization=said).status_code == 200, said
    assert keyed.ask("/metrics", Authorization=f"Bearer {ops}").status_code == 200
    assert "the key shop is for classify" in problem(keyed.ask("/metrics", Authorization=f"Bearer {shop}"), 403)
    assert keyed.ask("/classify", content=picture, Authorization=f"Bearer {keyed.secrets['root']}").status_code == 200


def test_a_bearer_beside_a_key_is_the_same_or_a_proxys(keyed):
    ops, shop = keyed.secrets["ops"], keyed.secrets["shop"]
    for said in (f"Bearer {ops}", "Basic b3BzOm9wcw==", "Bearer", ""):  # of other schemes it is a proxy's
        assert keyed.ask("/info", "ops", Authorization=said).status_code == 200, said
    for key, bearer in (("ops", shop), ("shop", ops), ("ops", "wrong"), ("wrong", ops)):
        detail = problem(keyed.ask("/info", key, Authorization=f"Bearer {bearer}"), 400)
        assert detail == "X-API-Key and Authorization hold different keys: send one of them"
    twice = HTTP.get(f"{keyed.url}/info", headers=[("Authorization", f"Bearer {ops}")] * 2)
    assert problem(twice, 400) == "send one Authorization header, not several"


@pytest.mark.parametrize("said", ["", "Bearer", "Basic b3BzOm9wcw==", "{ops}", "Bearer,{ops}", "Bearerx {ops}", "Bearer\t{ops}"])
def test_an_authorization_that_is_no_bearer_is_no_key(keyed, said):
    answer = keyed.ask("/info", Authorization=said.format(ops=keyed.secrets["ops"]))
    assert problem(answer, 401) == "send an API key of this server in the header X-API-Key, or as Authorization: Bearer KEY"


def test_wrong_bearers_are_slowed_and_logged_as_wrong_keys_are(keyed):
    here, taken = {"X-Forwarded-For": "203.0.113.21"}, []
    for i in range(FREE + 3):
        began = time.monotonic()
        answer = keyed.ask("/info", Authorization=f"Bearer guess-number-{i}", **here)
        assert "the API key in the header Authorization is none of this server's" in problem(answer, 401)
        taken.append(time.monotonic() - began)
    assert taken[-1] > 0.3  # the third that is held back
    text = keyed.log.read_text(encoding="utf-8")
    assert "from 203.0.113.21" in text
    assert "guess" not in text


def test_keys_come_and_go_while_the_server_runs_and_a_broken_file_keeps_them(keyed, picture):
    asked = lambda name: keyed.ask("/classify", name, picture).status_code  # noqa: E731
    keyed.secrets["guest"] = new(keyed.file, "guest", "--scope", "classify")
    until(lambda: asked("guest") == 200, 5)
    good = keyed.file.read_bytes()

    def refused() -> list[str]:
        lines = keyed.log.read_text(encoding="utf-8").splitlines()
        return [line for line in lines if line.endswith("the keys that were read before remain")]

    for broken, said in ((good[: len(good) // 2], "is not a key file"), (b"", "is not a key file"), (None, "cannot be read")):
        before = len(refused())
        if broken is None:
            keyed.file.unlink()
        else:
            keyed.file.write_bytes(broken)
        until(lambda before=before, said=said: any(said in line for line in refused()[before:]), 5)
        assert asked("guest") == 200
        assert asked("shop") == 200
    keyed.file.write_bytes(good)
    keyed.file.chmod(0o600)
    began = time.monotonic()
    assert command("key", "revoke", "guest", "--file", keyed.file)[0] == 0
    until(lambda: asked("guest") == 401, 5)
    assert time.monotonic() - began < 5
    assert asked("shop") == 200
    assert keyed.process.poll() is None


# wrong keys ------------------------------------------------------------------------------------------------------------------


def test_wrong_keys_are_slowed_and_logged_by_address_and_no_key_is_in_the_log(keyed, picture):
    """Of one client; a right key from the same address is answered at once."""
    here = {"X-Forwarded-For": "203.0.113.7"}
    taken = []
    for i in range(FREE + 3):
        began = time.monotonic()
        problem(keyed.ask("/classify", f"guess-number-{i}", picture, **here), 401)
        taken.append(time.monotonic() - began)
    assert max(taken[:FREE]) < taken[-1]
    assert taken[-1] > 0.3  # the third that is held back
    began = time.monotonic()
    assert keyed.ask("/classify", "shop", picture, **here).status_code == 200
    assert time.monotonic() - began < taken[-1]
    problem(keyed.ask("/classify", "guess-of-another", picture, **{"X-Forwarded-For": "203.0.113.8"}), 401)
    text = keyed.log.read_text(encoding="utf-8")
    assert "1 wrong API key from 203.0.113.7" in text
    assert "guess" not in text
    assert not any(secret in text for secret in keyed.secrets.values())


@pytest.mark.slow
def test_answers_that_are_held_back_are_few(keyed):
    """Ten at a time of one client: those beyond four are refused at once."""
    here = {"X-Forwarded-For": "203.0.113.9"}
    at_once([lambda: keyed.ask("/info", "wrong", **here) for _ in range(FREE + 10)])  # from here on an answer takes 3 s: all ten meet
    statuses: list[int] = []
    at_once([lambda: statuses.append(keyed.ask("/info", "wrong", **here).status_code) for _ in range(10)])
    assert set(statuses) == {401, 429}
    assert statuses.count(401) <= 4


def at_once(calls: list) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# limits ----------------------------------------------------------------------------------------------------------------------


def test_a_key_has_its_own_rate(keyed, picture):
    answers = [keyed.ask("/classify", "slow", picture) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert problem(answers[-1], 429).startswith("key:slow sends more than 0.5 requests per second, and may not (rate of its key)")
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 2
    assert keyed.ask("/classify", "shop", picture).status_code == 200


def test_info_tells_a_client_its_own_limits(keyed, live):
    limits = {key: keyed.ask("/info", key).json()["limits"]["client"] for key in ("ops", "root")}
    assert limits["ops"] == limits["root"] == {"rate": 50, "requests": 4, "bodies": 16, "chains": 64}
    assert set(live.info()["limits"]["client"].values()) == {None}


@contextlib.contextmanager
def half_sent(live: Live, n: int, *headers: str) -> Iterator[list[socket.socket]]:
    """Give ``n`` connections, on each of which a body has begun and not ended."""
    host, port = live.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(n):
            raw = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            lines = ["POST /classify HTTP/1.1", "Host: x", "Content-Type: image/png", "Content-Length: 1000", *headers]
            raw.sendall(("\r\n".join(lines) + "\r\n\r\n").encode() + b"\x89PNG")
            connections.append(raw)
        time.sleep(0.3)
        yield connections


def test_a_key_has_its_own_concurrency_and_it_counts_before_a_body_is_read(keyed, picture):
    with half_sent(keyed, 1, f"X-API-Key: {keyed.secrets['narrow']}"):
        answer = keyed.ask("/classify", "narrow", picture)
        assert "has 1 requests under way, and may have 1 (concurrency of its key)" in problem(answer, 429)
        assert answer.headers["retry-after"] == "1"
        assert keyed.ask("/classify", "shop", picture).status_code == 200
    until(lambda: keyed.ask("/classify", "narrow", picture).status_code == 200, 5)


def test_one_client_fills_its_own_places_alone(keyed, picture):
    with half_sent(keyed, 4, f"X-API-Key: {keyed.secrets['shop']}"):
        detail = problem(keyed.ask("/classify", "shop", picture), 429)
        assert detail == "key:shop has 4 requests under way, and may have 4 (serve --client-requests); try again later"
        assert keyed.ask("/classify", "root", picture).status_code == 200
    until(lambda: keyed.ask("/classify", "shop", picture).status_code == 200, 5)


LIMITED = ("--client-rate", "0", "--client-requests", "8", "--client-bodies", "2", "--client-chains", "4")


@pytest.fixture(scope="module")
def proxied(tmp_path_factory) -> Iterator[Keyed]:
    """A server without keys behind proxies that set Forwarded; for all that it sees, this machine is one."""
    folder = tmp_path_factory.mktemp("proxied")
    options = ("--device", "cpu", "--trusted-proxy", "127.0.0.0/8", "--trusted-proxy", "10.0.0.0/8", "--forwarded-header", "forwarded")
    with serving(SHIPPED, folder / "log", *options, *LIMITED) as live:
        yield Keyed(**vars(live), file=Path(), secrets={})


def named(live: Keyed, **headers: str) -> str:
    """Return the name of the client that sends ``headers``: a refusal has it."""
    said = {name.replace("_", "-"): value for name, value in headers.items()}
    detail = problem(HTTP.get(f"{live.url}/generate", params={"class": 3, "n": 5, "steps": 1}, headers=said), 422)
    client, rest = detail.split(" may have ")
    assert rest == "4 chains at a time, and asks for 5 at once (serve --client-chains)"
    return client


def test_a_trusted_proxys_report_names_the_client_and_no_other_header_does(proxied):
    assert named(proxied) == "127.0.0.1"
    assert named(proxied, Forwarded="for=198.51.100.1") == "198.51.100.1"
    assert named(proxied, Forwarded='for=6.6.6.6, for="[2001:db8:1:2:3::4]:80";proto=https, for=10.1.1.1') == "2001:db8:1:2::/64"
    assert named(proxied, X_Forwarded_For="198.51.100.2") == "127.0.0.1"
    assert named(proxied, Forwarded='for="198.51.100.1') == "127.0.0.1"  # malformed


def test_unfinished_bodies_of_a_client_are_few_and_others_send_theirs(proxied, picture):
    with half_sent(proxied, 2, "Forwarded: for=198.51.100.5"):
        answer = proxied.ask("/classify", content=picture, Forwarded="for=198.51.100.5")
        assert "has 2 bodies under way, and may have 2 (serve --client-bodies)" in problem(answer, 429)
        assert proxied.ask("/info", Forwarded="for=198.51.100.5").status_code == 200  # without a body
        assert proxied.ask("/classify", content=picture, Forwarded="for=198.51.100.6").status_code == 200
    until(lambda: proxied.ask("/classify", content=picture, Forwarded="for=198.51.100.5").status_code == 200, 5)


def test_a_body_that_has_come_is_no_longer_counted(proxied):
    """Four long requests with a body each, of a client that may send two at a time."""
    here = {"Forwarded": "for=198.51.100.7"}
    statuses: list[int] = []

    def draw() -> None:
        body = {"class": 3, "n": 1, "steps": 20}
        statuses.append(HTTP.post(f"{proxied.url}/generate", json=body, headers=here).status_code)

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert statuses == [200] * 4


def test_health_is_answered_whatever_a_client_has_under_way(proxied):
    with half_sent(proxied, 2, "Forwarded: for=198.51.100.8"):
        for _ in range(20):
            assert proxied.ask("/health", Forwarded="for=198.51.100.8").status_code == 200


def test_on_loopback_without_proxies_nobody_is_limited_and_no_header_is_believed(live, picture):
    """uvicorn would believe X-Forwarded-For of whoever connects from this machine."""
    with half_sent(live, 20):
        for _ in range(3):
            assert HTTP.post(f"{live.url}/classify", content=picture, headers={"X-Forwarded-For": "no address"}).status_code == 200


# the start -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("{}", "schema: Field required"),
        ('{"schema": 1, "keys": [{"name": "shop", "secret": "ebjdat_abc"}]}', "keys.0"),
        ('{"schema": 1,', "is not a key file"),
    ],
)
@pytest.mark.usefixtures("no_start")
def test_a_key_file_that_is_wrong_stops_the_start(tmp_path, monkeypatch, content, said):
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    by_option = command("serve", "--keys", file)
    monkeypatch.setenv("EBJDAT_KEYS", str(file))
    for status, out, errors in (by_option, command("serve")):
        assert status == 2
        assert said in errors
        assert str(file) in errors
        assert "ebjdat_abc" not in errors + out


def test_a_proxy_that_is_none_and_limits_that_are_none_stop_the_start():
    for proxy in ("proxy.example", "10.0.0.1/8", "0.0.0.0/0"):
        with pytest.raises(EbjdatError, match="trusted proxy"):
            build_server(Settings(trusted_proxy=(proxy,)))
    with pytest.raises(EbjdatError, match="--client-rate must be at least 0, not -1"):
        Settings(client_rate=-1)


@pytest.mark.usefixtures("no_start")
def test_the_stock_mode_refuses_keys(tmp_path, monkeypatch):
    file, said = tmp_path / "keys.json", "--stock checks no keys: leave it out, or --keys and LIT_SERVER_API_KEY"
    new(file, "shop")
    status, _, errors = command("serve", "--stock", "--keys", file)
    assert (status, said in errors) == (2, True)
    for key in ("x" * 30, ""):
        monkeypatch.setenv("LIT_SERVER_API_KEY", key)
        status, _, errors = command("serve", "--stock")
        assert (status, said in errors) == (2, True)


@pytest.mark.usefixtures("no_start")
def test_a_server_that_others_can_reach_without_keys_says_so_in_one_line(tmp_path, caplog):
    said = "whoever can reach this server can use it"
    file = tmp_path / "keys.json"
    new(file, "shop")
    for options, lines in (
        (("--host", "0.0.0.0"), 1),
        (("--trusted-proxy", "10.0.0.1"), 1),
        ((), 0),
        (("--host", "0.0.0.0", "--keys", file), 0),
        (("--host", "0.0.0.0", "--profile", "public"), 0),
    ):
        caplog.clear()
        assert command("serve", "/nowhere", *options)[0] == 2  # there is no such model
        assert [record.levelname for record in caplog.records] == ["WARNING"] * lines, caplog.text
        assert caplog.text.count(said) == lines


@pytest.mark.slow
def test_the_last_key_that_goes_leaves_the_server_closed(tmp_path):
    file = tmp_path / "keys.json"
    new(file, "shop")
    assert command("key", "revoke", "shop", "--file", file)[0] == 0
    assert Access.of(Settings(keys=file)).keys.closed
