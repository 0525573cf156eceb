"""A minimal load generator: HTTP/1.1 over persistent connections, closed and open loop, and the servers under test."""

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Result:
    """Seconds of each answered request, the number refused (not 200), and the total time."""

    seconds: list[float]
    refused: int
    elapsed: float

    @property
    def rate(self) -> float:
        """Responses per second."""
        return len(self.seconds) / self.elapsed

    def quantile(self, q: float) -> float:
        """Return a quantile of the response time, in ms."""
        return float(np.quantile(self.seconds, q)) * 1e3 if self.seconds else float("nan")


def request(path: str, body: bytes = b"", kind: str = "image/png") -> bytes:
    """Return the bytes of a request: a POST of ``body``, or a GET."""
    if not body:
        return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Connection:
    """One persistent connection, from ``address``, by which a server tells clients apart."""

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        self._port, self._address = port, address
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, data: bytes) -> int:
        """Send a request, read the whole response, return its status."""
        if not self._ends:
            self._ends = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(self._address, 0))
        reader, writer = self._ends
        writer.write(data)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        if b"connection: close" in lines:
            writer.close()
            self._ends = None
        return int(head.split(b" ", 2)[1])

    async def close(self) -> None:
        """Close the connection; the server drops what it had asked for."""
        if self._ends:
            self._ends[1].close()
            with contextlib.suppress(OSError):
                await self._ends[1].wait_closed()
            self._ends = None


def closed_loop(port: int, data: bytes, connections: int, seconds: float) -> Result:
    """Return the result of ``connections`` clients that send the next request on each response."""
    times: list[float] = []
    refused = 0
    end = time.monotonic() + seconds

    async def client() -> None:
        nonlocal refused
        connection = Connection(port)
        while (begin := time.monotonic()) < end:
            if await connection.ask(data) == 200:
                times.append(time.monotonic() - begin)
            else:
                refused += 1
        await connection.close()

    async def all_of_them() -> None:
        await asyncio.gather(*(client() for _ in range(connections)))

    began = time.monotonic()
    asyncio.run(all_of_them())
    return Result(times, refused, time.monotonic() - began)


def open_loop(port: int, data: bytes, rate: float, seconds: float, seed: int = 0) -> Result:
    """Return the result of Poisson arrivals at ``rate`` per second, however many are waiting; times count from arrival."""
    times: list[float] = []
    refused = 0
    idle: list[Connection] = []

    async def client(came: float) -> None:
        nonlocal refused
        connection = idle.pop() if idle else Connection(port)
        if await connection.ask(data) == 200:
            times.append(time.monotonic() - came)
        else:
            refused += 1
        idle.append(connection)

    async def all_of_them() -> None:
        dice, clients, now = random.Random(seed), [], time.monotonic()
        end = now + seconds
        while now < end:
            await asyncio.sleep(max(0.0, now - time.monotonic()))
            clients.append(asyncio.create_task(client(now)))
            now += dice.expovariate(rate)
        await asyncio.gather(*clients)
        await asyncio.gather(*(connection.close() for connection in idle))

    began = time.monotonic()
    asyncio.run(all_of_them())
    return Result(times, refused, time.monotonic() - began)


@dataclass
class Served:
    """A server under test; ``ready``: seconds until it answered /health."""

    process: subprocess.Popen[bytes]
    port: int
    ready: float

    def tree(self) -> list[int]:
        """Return the process ids of the server and its descendants."""
        return [self.process.pid, *descendants(self.process.pid)]

    def pss(self) -> float:
        """Return the proportional set size of the whole tree in MB: shared memory counts once."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
        return total / 1024

    @contextlib.contextmanager
    def asleep(self) -> Iterator[None]:
        """Stop every process of the tree until the end of the block."""
        tree = self.tree()
        for pid in tree:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in reversed(tree):
                os.kill(pid, signal.SIGCONT)

    def cpu(self) -> float:
        """Return the CPU seconds that the whole tree has used."""
        total = 0.0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                user, system = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[11:13]
                total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
        return total


def descendants(pid: int) -> list[int]:
    """Return the process ids below ``pid``."""
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, encoding="utf-8", check=True).stdout.split("\n")[1:]
    pairs = [tuple(map(int, line.split())) for line in listing if line.strip()]
    found, frontier = [], [pid]
    while frontier:
        parent = frontier.pop()
        below = [child for child, of in pairs if of == parent]
        found += below
        frontier += below
    return found


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(command: Callable[[int], list[str]], *cores: int) -> Iterator[Served]:
    """Run the server of ``command(port)`` on some cores, by default the first; yield it when it is ready, stop it after the block."""
    port = free_port()
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(port), preexec_fn=lambda: pin(*cores or (0,)), stdout=subprocess.DEVNULL, env=environment)
    try:
        while time.monotonic() < began + 120:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.02)
            if process.poll() is not None:
                raise RuntimeError(f"{command(port)} ended with {process.returncode}")
        yield Served(process, port, time.monotonic() - began)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(70)


CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def pin(*cores: int) -> None:
    """Pin this process to some of its original cores, if there are so many."""
    if len(CORES) > max(cores):
        os.sched_setaffinity(0, {CORES[core] for core in cores})
