"""Fixtures: the digits golden path, the shipped bundle, and live servers in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from hypothesis import settings

from benchmarks.load import descendants, free_port
from ebjdat_serve import pixels
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.wideresnet import WideResNet
from training.images import data_root

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)
settings.register_profile("noisy-machine", deadline=None)
settings.load_profile("noisy-machine")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: run it on one with make gpu-check"))
        if item.get_closest_marker("slow") and "EBJDAT_SOAK" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="takes ten minutes: make soak"))
        if item.get_closest_marker("data") and not (data_root() / "cifar-10-batches-py").is_dir():
            item.add_marker(
                pytest.mark.skip(reason=f"needs CIFAR-10 in {data_root()}: python -c 'from training.images import load; load(\"cifar10\")'")
            )


@dataclass
class Live:
    """A running server."""

    url: str
    process: subprocess.Popen
    log: Path

    def children(self) -> list[int]:
        return descendants(self.process.pid)


@contextmanager
def serving(
    model: Path, log: Path, *options: str, executable: tuple[str, ...] = (sys.executable, "-m", "ebjdat_serve.cli")
) -> Iterator[Live]:
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [*executable, "serve", str(model), "--port", str(port), "--threads", "1", *(options or ("--device", "cpu"))],
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


def wait_ready(live: Live, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if live.process.poll() is not None:
            raise AssertionError(f"the server ended with {live.process.returncode}:\n{live.log.read_text()}")
        try:
            if httpx2.get(f"{live.url}/health", timeout=2).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"the server was not ready within {seconds} s:\n{live.log.read_text()}")


@pytest.fixture(scope="session")
def shipped() -> Bundle:
    return Bundle.load(SHIPPED)


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """The store that `python training/train.py digits` publishes, run as a user runs it."""
    folder = tmp_path_factory.mktemp("golden")
    print("\ntraining digits (about a minute)", flush=True)
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


@pytest.fixture(scope="session")
def live(tmp_path_factory) -> Iterator[Live]:
    """The shipped model, served."""
    with serving(SHIPPED, tmp_path_factory.mktemp("live") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def test_images() -> tuple[pixels.Pixels, np.ndarray]:
    """500 CIFAR-10 test images, the first 50 of each class in order, and their labels."""
    from training.images import read_atlas

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
