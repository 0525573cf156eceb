"""Logs: the file of the audit log whatever happens to it, and a server whose log nobody reads."""

import errno
import fcntl
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress

import httpx2
import pytest

from benchmarks.load import free_port
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server import line_log
from ebjdat_serve.server.drift_states import DriftFile
from ebjdat_serve.server.line_log import LineFile, LineLog, ThreadedHandler, rotating, write_whole
from tests.classifiers import write
from tests.conftest import DIGITS, HTTP, until

PIPE = 4096
SET_PIPE_SIZE = 1031
"""Linux's F_SETPIPE_SZ, which Python 3.11 does not always name."""


def mode(file) -> int:
    return file.stat().st_mode & 0o777


def test_a_file_that_exists_becomes_its_owners_alone_and_is_continued(tmp_path):
    file = tmp_path / "audit"
    file.write_text("old\n")
    file.chmod(0o644)
    LineFile(file, 100, 2).write("new")
    assert (mode(file), file.read_text()) == (0o600, "old\nnew\n")


@pytest.mark.parametrize("what", ["link", "dangling link", "pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once_and_not_touched(tmp_path, what):
    file, target = tmp_path / "audit", tmp_path / "target"
    if what == "pipe":
        os.mkfifo(file)
    elif what == "folder":
        file.mkdir()
    elif what == "device":
        file = type(file)("/dev/null")
    else:
        if what == "link":
            target.write_text("of somebody else")
            target.chmod(0o644)
        file.symlink_to(target)
    before = os.lstat(file)
    with pytest.raises(EbjdatError, match=r"the audit log .* cannot be written"):
        rotating(file, 100, 2)
    if what in ("pipe", "device", "folder"):
        with pytest.raises(EbjdatError, match="cannot be written"):
            DriftFile(file)
    assert os.path.samestat(os.lstat(file), before)
    assert what != "link" or (target.read_text(), mode(target)) == ("of somebody else", 0o644)
    assert what != "dangling link" or not target.exists()


def test_what_is_moved_or_removed_is_made_anew_and_what_cannot_be_is_an_error(tmp_path):
    home = tmp_path / "logs"
    home.mkdir()
    file = home / "audit"
    log = LineFile(file, 100, 2)
    log.write("one")
    file.rename(home / "moved")
    log.write("two")
    file.unlink()
    log.write("three")
    assert ((home / "moved").read_text(), file.read_text(), mode(file)) == ("one\n", "three\n", 0o600)
    shutil.rmtree(home)
    with pytest.raises(FileNotFoundError):
        log.write("lost")
    home.mkdir()
    log.write("four")
    assert file.read_text() == "four\n"


def test_a_full_file_is_replaced_and_so_many_are_kept(tmp_path):
    file = tmp_path / "audit"
    log = LineFile(file, 10, 2)
    for line in ("first", "second", "third", "longer than a file"):
        log.write(line)
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {
        "audit": "longer than a file\n", "audit.1": "third\n", "audit.2": "second\n"
    }  # fmt: skip


def test_on_a_full_disk_a_line_is_whole_or_not_there(tmp_path):
    file, before, ignored = tmp_path / "audit", resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    log = LineFile(file, 10**6, 2)
    log.write("a" * 60)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        with pytest.raises(OSError, match="No space left") as raised:
            log.write("b" * 60)  # 39 bytes of it fit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert raised.value.errno == errno.ENOSPC
    log.write("c")
    assert file.read_text() == f"{'a' * 60}\nc\n"


def test_a_process_that_is_forked_writes_its_own_lines(tmp_path):
    file = tmp_path / "lines"
    lines = LineLog(LineFile(file, 10**6, 1).write, "a log")
    lines.put("parent")
    until(lambda: file.read_text() == "parent\n")
    if (child := os.fork()) == 0:
        lines.put("child")
        lines.close(10)
        os._exit(0)
    os.waitpid(child, 0)
    lines.close(10)
    assert file.read_text() == "parent\nchild\n"


def test_a_log_that_nobody_holds_is_written_and_gone_with_its_thread():
    written = []
    lines = LineLog(written.append, "a log that nobody holds")
    lines.put("one")
    gone = weakref.ref(lines)
    assert [thread.name for thread in threading.enumerate()].count("a log that nobody holds") == 1
    del lines
    assert (gone(), written) == (None, ["one"])
    assert "a log that nobody holds" not in [thread.name for thread in threading.enumerate()]


def test_an_empty_line_is_a_line():
    written = []
    lines = LineLog(written.append, "a log")
    for line in ("", "two"):
        lines.put(line)
    lines.close(10)
    assert (written, lines.lost) == (["", "two"], 0)


def test_lines_that_still_wait_at_the_end_are_counted_and_said(capfd):
    gate, lines = threading.Event(), LineLog(lambda line: gate.wait(10), "the audit log")
    for i in range(3):
        lines.put(str(i))
    lines.close(0.2)
    gate.set()
    assert lines.lost == 3
    assert capfd.readouterr().err == "the audit log: 3 lines are lost, which could not be written within 0.2 s at the end\n"


def test_what_is_said_at_the_end_waits_for_no_reader(monkeypatch):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * PIPE)
    os.set_blocking(writing, True)
    monkeypatch.setattr(line_log, "STDERR", writing)
    began = time.monotonic()
    line_log.say("lost")
    os.close(writing)
    line_log.say("closed")
    assert time.monotonic() - began < 1
    os.close(reading)


def test_who_logs_never_waits_for_who_reads():
    reading, writing = os.pipe()
    fcntl.fcntl(writing, SET_PIPE_SIZE, PIPE)
    handler = ThreadedHandler(writing)
    began = time.monotonic()
    for i in range(100):
        handler.handle(logging.LogRecord("name", logging.INFO, "", 0, f"{i:099}", None, None))
    assert time.monotonic() - began < 1
    found = b""
    while found.count(b"\n") < 100:
        found += os.read(reading, PIPE)
    handler.lines.close(10)
    assert [int(line) for line in found.split()] == list(range(100))
    assert handler.lines.lost == 0
    os.close(reading)
    os.close(writing)


def test_a_record_that_has_no_text_is_lost_and_counted_and_whoever_logs_goes_on():
    class Strange:
        def __str__(self):
            raise AttributeError("no text")

    handler = ThreadedHandler(-1)  # nothing comes to be written
    for arguments in ((Strange(),), (1, 2)):
        handler.handle(logging.LogRecord("name", logging.INFO, "", 0, "%s", arguments, None))
    assert handler.lines.lost == 2


WORKER = """
import logging, os
from pathlib import Path
from ebjdat_serve.server.compute.workers import ClassifyWorker
from ebjdat_serve.server.settings import Settings

ClassifyWorker("model", Settings(Path()), ()).setup("cpu")
logging.getLogger("ebjdat_serve").error("x" * 10_000)
os.write(1, b"went on")
"""


def test_a_worker_waits_for_no_reader_of_its_log():
    command = [sys.executable, "-c", WORKER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        fcntl.fcntl(worker.stderr, SET_PIPE_SIZE, PIPE)  # less than the line
        try:
            assert select.select([worker.stdout], [], [], 60)[0]
            assert os.read(worker.stdout.fileno(), 100) == b"went on"
            assert worker.stderr.read().endswith(b"xxx\n")
        finally:
            worker.kill()


def test_half_a_character_is_written_as_an_escape():
    reading, writing = os.pipe()
    write_whole(writing, "a\ud800é")
    assert os.read(reading, 100).decode() == "a\\ud800é\n"
    os.close(reading)
    os.close(writing)


def test_a_drawing_that_is_cut_off_by_a_stop_has_its_line(tmp_path):
    port = free_port()
    options = "--log json --device cpu --graceful-timeout 1 --generate-graceful-timeout 1 --max-steps 10000 --max-work 640000"
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(DIGITS), "--port", str(port), *options.split()]
    command += ["--generate-backlog", "100000"]
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            until(lambda: answers(port), 60)
            with socket.create_connection(("127.0.0.1", port)) as drawing:
                drawing.settimeout(30)
                drawing.sendall(b"GET /generate?class=1&n=64&steps=10000&format=json HTTP/1.1\r\nHost: x\r\nX-Request-ID: drawing\r\n\r\n")
                time.sleep(1)
                process.terminate()
                assert b" 503 " in drawing.recv(4096)
        finally:
            process.terminate()
            assert process.wait(60) == 0
    rows = [json.loads(line) for line in (tmp_path / "log").read_text(encoding="utf-8").splitlines()]
    assert [(row["route"], row["code"]) for row in rows if row.get("id") == "drawing"] == [("/generate", 503)]


@pytest.mark.parametrize("style", ["text", "json"])
def test_a_server_whose_log_nobody_reads_answers_and_stops(tmp_path, style):
    """Wrong keys write the log, which anybody may send: to wait for its reader would stop the server for all, and at SIGTERM for ever."""
    port = free_port()
    write(tmp_path / "model")
    (tmp_path / "keys.json").write_text('{"schema": 1, "keys": []}')
    (tmp_path / "keys.json").chmod(0o600)
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(tmp_path / "model"), "--port", str(port), "--log", style]
    command += ["--keys", str(tmp_path / "keys.json"), "--access-log", "--device", "cpu", "--generate-workers", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            for pipe in (process.stdout, process.stderr):
                fcntl.fcntl(pipe, SET_PIPE_SIZE, PIPE)
            until(lambda: answers(port), 60)
            for full in (process.stdout, process.stderr):  # what would take an hour of warnings
                end = os.open(f"/proc/{process.pid}/fd/{1 if full is process.stdout else 2}", os.O_WRONLY | os.O_NONBLOCK)
                with pytest.raises(BlockingIOError):
                    while True:
                        os.write(end, b"\n")
                os.close(end)
            for _ in range(6):
                assert HTTP.get(f"http://127.0.0.1:{port}/info", headers={"X-API-Key": "wrong"}, timeout=10).status_code in (401, 429)
                assert answers(port)
        finally:
            process.terminate()
            began = time.monotonic()
            status = process.wait(60)
        assert (status, time.monotonic() - began < 20) == (0, True)
        assert b"wrong" not in process.stderr.read(PIPE)  # and no traceback of the interpreter's end
        process.stdout.read(PIPE)


def answers(port: int) -> bool:
    """Whether the server answers its probe; not yet while it starts."""
    try:
        return HTTP.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
    except httpx2.ConnectError:
        return False
