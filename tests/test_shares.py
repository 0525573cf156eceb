"""One client's load beside others, through a server: who asks for little is admitted and served at once, whatever the greedy one has."""

import contextlib
import os
import signal
import socket
import statistics
import threading
import time
from pathlib import Path

import httpx2
import pytest

from ebjdat_serve.server.settings import Settings
from tests.conftest import LONG, SHIPPED, Live, serving, until

GREEDY, POLITE = "127.0.0.1", [f"127.0.0.{i}" for i in range(2, 12)]
"""Addresses of this machine, by which the server tells clients apart."""
SHORT = "/generate?class=1&steps=20&seed=3"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(SHIPPED, tmp_path_factory.mktemp("shares") / "log", *LONG, "--generate-backlog", "600") as live:
        yield live


def client(server: Live, address: str) -> httpx2.Client:
    """Return a client that connects from ``address``."""
    return httpx2.Client(base_url=server.url, timeout=60, transport=httpx2.HTTPTransport(local_address=address))


def timed(client: httpx2.Client, path: str) -> tuple[float, httpx2.Response]:
    began = time.monotonic()
    answer = client.get(path)
    return time.monotonic() - began, answer


@contextlib.contextmanager
def asked(server: Live, n: int, request: bytes):
    """Send ``request`` from the greedy client over ``n`` connections, and leave at the end of the block; give the connections."""
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_connection((host, int(port)), timeout=30)) for _ in range(n)]
        for one in sockets:
            one.sendall(request)
        yield sockets


def load(server: Live, kind: str, what: str) -> int:
    return server.info()["load"][kind][what]


def test_beside_a_client_with_all_chains_it_may_have_others_are_admitted_and_drawn_first(server):
    drawn: dict[str, httpx2.Response] = {}
    took: dict[str, float] = {}

    def draw(address):
        with client(server, address) as one:
            took[address], drawn[address] = timed(one, SHORT)

    with client(server, GREEDY) as greedy, client(server, POLITE[0]) as polite:
        alone = [timed(polite, SHORT) for _ in range(5)]
        with asked(server, 2, b"GET /generate?class=2&n=64&steps=120 HTTP/1.1\r\nHost: x\r\n\r\n"):
            until(lambda: load(server, "generate", "chains") == 128)
            refused = greedy.get(SHORT)
            assert refused.status_code == 429
            assert "at most 128 may" in refused.json()["detail"]
            beside = [timed(polite, SHORT) for _ in range(5)]
            threads = [threading.Thread(target=draw, args=(address,)) for address in POLITE]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert load(server, "generate", "chains") == 128  # the greedy client's are still there
    answers = [answer for _, answer in beside] + list(drawn.values())
    assert len(answers) == 15
    assert all(answer.status_code == 200 and answer.content == alone[0][1].content for answer in answers)
    own = statistics.median(seconds for seconds, _ in alone)
    assert statistics.median(seconds for seconds, _ in beside) <= 3 * own
    assert max(took.values()) <= 3 * len(POLITE) * own


def test_beside_a_client_with_all_places_of_the_classify_queue_others_are_answered(server, picture):
    size = Settings().classify_queue
    worker = next(pid for pid in server.children() if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8") == "ebjdat-classify\n")
    ask = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(picture), picture)
    said: list[int] = []

    def classify():
        with client(server, POLITE[0]) as polite:
            said.append(polite.post("/classify", content=picture).status_code)

    with contextlib.ExitStack() as stack:
        os.kill(worker, signal.SIGSTOP)
        stack.callback(os.kill, worker, signal.SIGCONT)
        stack.enter_context(asked(server, size, ask))
        until(lambda: load(server, "classify", "requests") == size)
        with client(server, GREEDY) as greedy:
            refused = greedy.post("/classify", content=picture)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        polite = threading.Thread(target=classify)
        polite.start()
        until(lambda: load(server, "classify", "requests") == size + 1)
        os.kill(worker, signal.SIGCONT)
        polite.join()
    assert said == [200]
