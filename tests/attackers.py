"""Attackers for the soak: each sends what it has without end, and notes every answer that is not a stated refusal."""

import base64
import select
import socket
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2

from benchmarks.hostile_images import png
from benchmarks.hostile_load import hostile
from tests.test_doors import DOORS, HOSTILE

REFUSALS = {400, 401, 403, 404, 405, 408, 411, 413, 414, 415, 417, 421, 422, 429, 431, 503, 504}
"""What may be answered to an attacker; 200 where what it sends is only dear."""

ANSWERED = {
    ("images", 200),
    ("doors", 400),
    ("unfinished", 429),
    ("guesses", 401),
    ("lists", 200),
    ("drawings", 200),
    ("never_reads", 200),
}
"""What a soak of some minutes must have seen: attacks that arrive where they are meant to."""

PLAIN = png(64, 64, pixels=bytes(64 * 193))


def status_of(client):
    """Return the status of the answer that arrives, of which no more is read; 0 where the connection ends before there is one."""
    said = b""
    while len(said) < len(b"HTTP/1.1 200"):
        if not (data := client.recv(len(b"HTTP/1.1 200") - len(said))):
            return 0
        said += data
    return int(said.split()[1])


@dataclass
class Attackers:
    """Attacks on one server by clients with the keys of others, with wrong keys and with none."""

    url: str
    keys: dict[str, str]  # by kind, so that no attacker is stopped by the limits of another
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    BODIES = ("blanks in a string", "wide gaps between 64 strings", "deep", "a form of near boundaries", "thousands of parts")
    KINDS = ("images", "parsing", "doors", "unfinished", "guesses", "lists", "drawings", "never_reads")

    def __post_init__(self):
        host, port = self.url.removeprefix("http://").split(":")
        self.address = host, int(port)
        self.pictures = hostile()
        self.bodies = [(kind, make()) for kind, make in (HOSTILE[name] for name in self.BODIES)]

    def note(self, kind, status, also=()):
        """Count an answer; note one that is neither a refusal nor allowed."""
        self.answers[kind, status] += 1
        if status not in REFUSALS and status not in also:
            self.wrong.append(f"{kind}: {status}")

    def post(self, kind, path, also=(), key=None, **content):
        """Send one request with the attackers' key, or another."""
        headers = {"X-API-Key": key or self.keys[kind], **content.pop("headers", {})}
        # verify=False: or httpx2 would read all certificates for each request, 50 ms of a processor that the server needs
        self.note(kind, httpx2.post(f"{self.url}{path}", headers=headers, timeout=60, verify=False, **content).status_code, also)

    def images(self, dice):
        """Images that are refused by their headers, and the dearest that are not."""
        self.post("images", "/classify", (200,), content=dice.choice(self.pictures))

    def parsing(self, dice):
        """Bodies that are dear to parse."""
        kind, body = dice.choice(self.bodies)
        self.post("parsing", "/classify", content=body, headers={"Content-Type": kind})
        time.sleep(0.5)

    def doors(self, dice):
        """What leaves HTTP/1.1 as it is bounded; the refusal must arrive."""
        name = dice.choice(list(DOORS))
        with socket.create_connection(self.address, timeout=20) as client:
            try:
                client.sendall(DOORS[name][0])
            except ConnectionError:
                self.answers["doors", 0] += 1  # its answer is read all the same
            received = b""
            while data := client.recv(2**16):
                received += data
        if not received.startswith(b"HTTP/1.1 ") or b"\r\n\r\n" not in received:
            self.wrong.append(f"doors: {name}: {received[:80]!r}")
            return
        self.note("doors", int(received.split()[1]))
        time.sleep(0.05)

    def unfinished(self, dice):
        """Thirty bodies and headers at once, of which a byte comes now and then, and which never end."""
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\nContent-Length: 100000\r\n" % self.keys["unfinished"].encode()
        clients = []
        try:
            for _ in range(30):
                clients.append(socket.create_connection(self.address, timeout=20))
                clients[-1].sendall(dice.choice([head, head + b"\r\n", head + b"\r\nhalf"]))
            end = time.monotonic() + dice.uniform(2, 12)
            while time.monotonic() < end and clients:
                time.sleep(0.5)
                clients = [client for client in clients if self.goes_on(client)]
        except ConnectionError:
            self.answers["unfinished", 0] += 1  # it was cut off as it began
        finally:
            for client in clients:
                client.close()

    def goes_on(self, client):
        """Send a byte more, or note the answer; return whether there is none yet. A connection may be reset, not closed, without one."""
        try:
            if not select.select([client], [], [], 0)[0]:
                client.send(b"a")
                return True
            self.note("unfinished", status_of(client))
        except ConnectionError:
            self.answers["unfinished", 0] += 1
        client.close()
        return False

    def guesses(self, dice):
        """Wrong keys."""
        self.post("guesses", "/classify", key=f"ebjdat_{dice.random()}", content=b"x")

    def lists(self, dice):
        """Lists of as many images as one may send."""
        picture = base64.b64encode(self.pictures[0] if dice.random() < 0.2 else PLAIN).decode()
        self.post("lists", "/energy", (200,), json={"images": [picture] * 64})
        time.sleep(0.1)

    def drawings(self, dice):
        """Drawings of many images, some of which it does not wait for."""
        query, patience = {"class": dice.randrange(10), "n": 16, "steps": dice.choice([10, 40])}, dice.choice([0.5, 130])
        try:
            answer = httpx2.get(
                f"{self.url}/generate",
                params=query,
                headers={"X-API-Key": self.keys["drawings"]},
                timeout=patience,
                verify=False,
            )
            self.note("drawings", answer.status_code, (200,))
        except httpx2.TimeoutException:
            self.answers["drawings", 0] += 1
            if patience > 1:
                self.wrong.append(f"drawings: no answer within {patience} s")

    def never_reads(self, dice):
        """A stream of which it reads how it begins, and then no more."""
        head = b"GET /generate?class=%d&n=4&steps=20&every=1&stream=true HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n\r\n"
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(130)
            client.connect(self.address)
            client.sendall(head % (dice.randrange(10), self.keys["never_reads"].encode()))
            self.note("never_reads", status_of(client), (200,))
            time.sleep(dice.uniform(1, 8))
