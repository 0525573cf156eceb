"""Test tiers, progress lines, and fixtures: the digits bundle, the shipped bundle, and live servers in their own processes."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from benchmarks.load import descendants, free_port
from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.cpus import cpus
from ebjdat_serve.networks.wideresnet import WideResNet
from ebjdat_serve.server.settings import DECODERS, SHIPPED
from ebjdat_serve.store import publish
from training.data.datasets import data_root

try:
    import httpcore2
    import httpx2
except ImportError:  # the tests marked gpu run on machines that have no server's packages
    httpx2 = None
else:  # `httpx2.get` would read all certificates each time, which takes 25 ms
    httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "tests" / "data" / "digits"
"""What `python training/train.py digits` made, once: tests/data/README.md."""
HTTP: Any = httpx2 and httpx2.Client(verify=False, timeout=30, headers={"Connection": "close"})
torch.set_num_threads(1)
settings.register_profile("noisy-machine", deadline=None)
settings.load_profile("noisy-machine")


def pytest_addoption(parser):
    parser.addoption("--soak", type=float, default=101.0, metavar="SECONDS", help="length of the long soak (%(default)s; make soak: 600)")
    parser.addoption("--rehearse", action="store_true", help="take the tests marked gpu on the CPU: make gpu-rehearse")


@pytest.hookimpl(optionalhook=True)  # a machine of the tests marked gpu has no pytest-xdist
def pytest_xdist_auto_num_workers():
    """One worker a core, at most four: each starts servers of its own, which have processes of their own."""
    return min(4, cpus())


@pytest.hookimpl(trylast=True)  # after pytest has made its terminal reporter
def pytest_configure(config):
    if not hasattr(config, "workerinput") and (terminal := config.pluginmanager.get_plugin("terminalreporter")):
        config.pluginmanager.register(Progress(terminal.write_line), "progress")


class Progress:
    """Names, every half minute, the tests that have run that long: a soak or a training run says nothing for minutes."""

    def __init__(self, write: Callable[[str], None], every: float = 30.0):
        self.write, self.every = write, every
        self.since: dict[str, float] = {}
        self.over = threading.Event()

    def pytest_runtest_logstart(self, nodeid):
        self.since[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid):
        self.since.pop(nodeid, None)

    def pytest_sessionstart(self):
        threading.Thread(target=self.watch, daemon=True).start()

    def pytest_sessionfinish(self):
        self.over.set()

    def watch(self):
        while not self.over.wait(self.every):
            for nodeid, since in list(self.since.items()):
                if (seconds := time.monotonic() - since) > self.every:
                    self.write(f"\n{nodeid} has run for {seconds:.0f} s")


SLOW_UNTIL = "PYTEST_SLOW_UNTIL"
"""The variable that names the time, in seconds since 1970, after which a run begins no slow test: .ci/run has thirty minutes in all."""


@pytest.hookimpl(tryfirst=True)  # before fixtures are made
def pytest_runtest_setup(item):
    until = os.environ.get(SLOW_UNTIL)
    if until and item.get_closest_marker("slow") and time.time() > float(until):
        pytest.skip("the time of this run is over: make test-slow runs it")


LONGEST = (
    "test_golden", "test_soak", "test_training", "test_evaluation", "test_extending", "test_faults", "test_precision", "test_noise",
    "test_install", "test_refresh", "test_survival", "test_gate", "test_registries", "test_import_packages", "test_import_libraries",
)  # fmt: skip
"""The files whose slow tests take longest, the longest first: begun last, one would keep one worker at work while the others have none."""


SLOW_FIXTURES = ("trained", "precise")
"""Fixtures that take a minute or more: who asks for one is slow. The tests of one are of one file, which one worker runs (loadfile)."""


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(config, items):
    if config.option.markexpr == "slow":
        items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        for name in SLOW_FIXTURES:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not config.getoption("--rehearse"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run it on one with make gpu-check"))
        if item.get_closest_marker("data") and not (data_root() / "cifar-10-batches-py").is_dir():
            item.add_marker(
                pytest.mark.skip(
                    reason=f"needs CIFAR-10 in {data_root()}: python -c 'from training.data.datasets import load; load(\"cifar10\")'"
                )
            )


@dataclass
class Live:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: Path

    def children(self) -> list[int]:
        return descendants(self.process.pid)

    def decoders(self) -> list[int]:
        return [pid for pid in self.children() if Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() == "ebjdat-decode"]

    def info(self) -> dict[str, Any]:
        return HTTP.get(f"{self.url}/info").json()


@contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    more: tuple[str, ...] = (),
    executable: tuple[str, ...] = (sys.executable, "-m", "ebjdat_serve.cli"),
) -> Iterator[Live]:
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [*executable, "serve", str(model), *more, "--port", str(port), "--threads", "1", *(options or ("--device", "cpu"))],
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            cwd=log.parent,
        )
    live = Live(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_ready(live)
        yield live
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the server did not stop on SIGTERM within 20 s:\n{log.read_text(encoding='utf-8')}") from None


def wait_ready(live: Live, seconds: float = 120) -> None:
    def ready():
        assert live.process.poll() is None, f"the server ended with {live.process.returncode}:\n{live.log.read_text()}"
        try:
            return HTTP.get(f"{live.url}/health", timeout=2).status_code == 200
        except httpx2.TransportError:
            return False

    until(ready, seconds)


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until ``condition`` holds, and fail when it does not within so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A command's main() sets the threads of the process that calls it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    return Bundle.load(SHIPPED)


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """A store with the digits bundle that is kept in tests/data."""
    store = tmp_path_factory.mktemp("golden") / "store"
    publish(Bundle.load(DIGITS), store)
    return store


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The store that `python training/train.py digits` publishes now, run as a user runs it: a test that asks for it is slow."""
    folder = tmp_path_factory.mktemp("trained")
    done = subprocess.run(
        [sys.executable, str(ROOT / "training" / "train.py"), "digits", "--run", "golden", "--threads", "1"],
        env={**os.environ, "EBJDAT_RUNS": str(folder), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "golden" / "store"


LONG = ("--device", "cpu", "--max-steps", "1000")


@pytest.fixture(scope="session")
def live(tmp_path_factory) -> Iterator[Live]:
    """The shipped model, served with chains of up to 1000 steps."""
    with serving(SHIPPED, tmp_path_factory.mktemp("live") / "server.log", *LONG) as server:
        yield server


@pytest.fixture
def no_start(monkeypatch) -> None:
    """For `serve` in this process: it must end before a server starts, and not have all that follows logged to the stream of one test."""
    from ebjdat_serve import logs
    from ebjdat_serve.server import litserve_adapter

    monkeypatch.setattr(litserve_adapter, "run", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr(logs, "configure", lambda _: None)
    monkeypatch.setenv("EBJDAT_PORT", str(free_port()))  # a taken one would be named first


@pytest.fixture
def long_live(live) -> Iterator[Live]:
    """`live` for tests that strain it: each leaves it idle, and with the processes it had."""
    until(lambda: len(live.decoders()) == 1 + DECODERS)
    before = set(live.children()) - set(live.decoders())  # these end with the clients of their images
    yield live
    until(lambda: live.info()["load"]["generate"]["chains"] == 0)
    until(lambda: len(live.decoders()) == 1 + DECODERS)
    assert set(live.children()) - set(live.decoders()) == before, live.log.read_text()


@pytest.fixture(scope="session")
def test_images() -> tuple[pixels.Pixels, np.ndarray]:
    """500 CIFAR-10 test images, the first 50 of each class in order, and their labels."""
    from training.data.datasets import read_atlas

    images = read_atlas(ROOT / "tests" / "data" / "cifar10_test_500.webp", 32)
    return images, np.repeat(np.arange(10), 50)


@pytest.fixture
def picture() -> bytes:
    return pixels.encode_png(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))


@pytest.fixture
def model() -> WideResNet:
    """A small network of four classes in train mode, its batch-norm statistics no longer those of a fresh one."""
    torch.manual_seed(0)
    net = WideResNet(10, 1, 4).train()
    with torch.no_grad():
        net(torch.rand(16, 3, 8, 8))
    return net
