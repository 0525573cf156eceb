"""Tests of locks: only another live process blocks, with and without flock."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.locking import Held, exclusive_lock
from training.data.datasets import load
from training.errors import TrainingError
from training.loop.start import new_state
from training.loop.state import load_position, previous
from training.presets import DIGITS
from training.refresh import lock

RIVAL = """
import sys
from pathlib import Path
from ebjdat_serve.locking import exclusive_lock
{lacking}
with exclusive_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=[None, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def lacking(request, monkeypatch) -> str:
    """A file system with flock, and those that refuse it; what makes another process refuse it too."""
    if request.param is None:
        return ""

    def refuse(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    return f"import fcntl, os\ndef refuse(*_): raise OSError({request.param}, os.strerror({request.param}))\nfcntl.flock = refuse"


def test_one_at_a_time_and_the_next_after_it(lacking, tmp_path):
    order = []

    def work(name):
        with exclusive_lock(tmp_path / ".lock"):
            order.append(name)
            time.sleep(0.1)
            order.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])


def test_a_rival_is_one_only_while_it_lives(lacking, tmp_path):
    file = tmp_path / ".lock"
    words = [sys.executable, "-c", RIVAL.format(lacking=lacking), str(file)]
    rival = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert rival.stdout.readline() == "held\n"
        with pytest.raises(Held, match="another process holds"), exclusive_lock(file, wait=False):
            pass
        with pytest.raises(TrainingError, match="another process holds") as error, lock(tmp_path):
            pass
        assert error.value.options == ("--run NAME",)
    finally:
        rival.kill()  # it leaves behind what it made
        rival.communicate(timeout=30)
    end = time.monotonic() + 20
    while True:
        try:
            with lock(tmp_path):
                break
        except TrainingError:
            assert time.monotonic() < end
            time.sleep(0.05)


def test_what_is_no_rival_is_said_as_it_is(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(EbjdatError, match=r"cannot be written \(Input/output error\): set EBJDAT_RUNS"), lock(tmp_path):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EbjdatError, match="Not a directory"), lock(tmp_path / "file" / "run"):
        pass


def test_a_lock_makes_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError), exclusive_lock(tmp_path / "absent" / ".lock"):
        pass
    assert not (tmp_path / "absent").exists()


def test_there_is_one_way_to_lock():
    root = Path(__file__).parent.parent
    files = [file for folder in ("ebjdat_serve", "training", "export", "benchmarks") for file in (root / folder).rglob("*.py")]
    assert [file.name for file in files if re.search(r"\b(flock|lockf)\(", file.read_text(encoding="utf-8"))] == ["locking.py"]


def test_a_state_is_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    state = new_state(DIGITS.warm_start, load("digits"), None, torch.device("cpu"))
    for step in (1, 2):
        state.step = step
        state.save(tmp_path / "state.pt")
    assert [load_position(file).step for file in (tmp_path / "state.pt", previous(tmp_path / "state.pt"))] == [2, 1]
