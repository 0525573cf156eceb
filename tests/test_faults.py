"""Faults: a killed worker, a client that leaves, a full queue, a stop signal, wrong wishes at the prompt."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.settings import SHIPPED, Settings
from tests.conftest import free_port, serving, wait_ready


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def kill_workers(server):
    for pid in server.children():
        command = Path(f"/proc/{pid}/cmdline").read_text()
        if "spawn_main" in command and "resource_tracker" not in command:
            os.kill(pid, signal.SIGKILL)


def gone(pids, seconds=15):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_leaves_no_process_behind(tmp_path, number):
    with serving(SHIPPED, tmp_path / "log") as server:
        tree = [server.process.pid, *server.children()]
        assert len(tree) >= 4
        server.process.send_signal(number)
        assert server.process.wait(20) == 0
        assert gone(tree), server.log.read_text()
        assert "Traceback" not in server.log.read_text()


def test_a_request_in_flight_is_answered_before_the_end(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        answers = []

        def ask():
            answers.append(httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 60}, timeout=60).status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(0.4)
        server.process.send_signal(signal.SIGTERM)
        thread.join(30)
        assert answers == [200]


def test_a_stop_while_starting_leaves_no_process_behind(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            [sys.executable, "-m", "ebjdat_serve.cli", "serve", str(SHIPPED), "--port", str(free_port())],
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=tmp_path,
        )
    end = time.monotonic() + 30
    while "starting" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(1.2)  # the workers are being spawned
    process.send_signal(signal.SIGTERM)
    process.wait(20)
    listing = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True, check=True).stdout
    left = [int(pid) for pid, sid in re.findall(r"(\d+)\s+(\d+)", listing) if int(sid) == process.pid]
    assert gone(left), log.read_text()


def test_a_killed_worker_is_replaced_and_others_go_on(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log") as server:
        before = httpx2.post(f"{server.url}/classify", content=picture).json()
        kill_workers(server)
        end = time.monotonic() + 40
        while time.monotonic() < end:
            try:
                answer = httpx2.post(f"{server.url}/classify", content=picture, timeout=30)
            except httpx2.TransportError:
                continue
            if answer.status_code == 200:
                break
        assert answer.status_code == 200, server.log.read_text()
        assert answer.json() == before
        assert httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200


def test_a_worker_killed_at_work_costs_its_request_only_and_soon(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        answers = []

        def ask():
            begin = time.monotonic()
            answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 900}, timeout=100)
            answers.append((answer.status_code, answer.headers.get("retry-after"), time.monotonic() - begin))

        thread = threading.Thread(target=ask)
        thread.start()
        time.sleep(1.5)
        kill_workers(server)
        thread.join(60)
        status, retry_after, seconds = answers[0]
        assert (status, retry_after) == (503, "3")
        assert seconds < 30  # not the deadline, 120 s
        wait_ready(server)
        assert httpx2.get(f"{server.url}/generate", params={"class": 1, "steps": 2}, timeout=30).status_code == 200


def test_clients_that_leave_take_their_requests_along(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(Settings().generate_queue + 4):  # more than the queue holds: leavers must not fill it
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"GET /generate?class=1&n=8&steps=150 HTTP/1.1\r\nHost: x\r\n\r\n")
                time.sleep(0.15)
        begin = time.monotonic()
        answer = httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=60)
        assert answer.status_code == 200
        assert time.monotonic() - begin < 40  # one abandoned job may be running; twenty would take minutes


def test_a_full_queue_answers_503_with_retry_after_and_classify_goes_on(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log") as server:
        statuses = []

        def ask():
            answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 40}, timeout=120)
            statuses.append((answer.status_code, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(Settings().generate_queue + 8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert httpx2.post(f"{server.url}/classify", content=picture, timeout=30).status_code == 200
        for thread in threads:
            thread.join()
        refused = [retry for status, retry in statuses if status == 503]
        assert {status for status, _ in statuses} == {200, 503}
        assert len(refused) >= 4
        assert set(refused) == {"1"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "/nowhere"], "neither a bundle"),
        (["serve", "--alpha", "0.0001"], "1/(n+1)"),
        (["serve", "--port", "80"], "1024 to 65535"),
        (["inspect", "/nowhere"], "neither a bundle"),
        (["verify", "/nowhere"], "neither a bundle"),
    ],
)
def test_a_wrong_wish_is_an_error_at_the_prompt(arguments, said):
    done = subprocess.run([sys.executable, "-m", "ebjdat_serve.cli", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gpu_that_is_not_there_is_named_not_replaced():
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "[gpu]" in done.stderr


def test_the_death_of_the_http_process_ends_the_server(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        port = int(server.url.rsplit(":", 1)[1])
        tree = [server.process.pid, *server.children()]
        listing = subprocess.run(["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True).stdout
        forked = [int(pid) for pid, ppid, _ in re.findall(r"(\d+)\s+(\d+)\s+(\d+)", listing) if int(ppid) == server.process.pid]
        holding = [pid for pid in forked if listens(pid, port)]
        assert holding
        for pid in holding:
            os.kill(pid, signal.SIGKILL)
        assert server.process.wait(30) == 2
        assert "HTTP process died" in server.log.read_text()
        assert gone(tree)


def listens(pid, port):
    """Whether a process runs uvicorn: it is forked, so its command line is its parent's, and it serves, so it has an epoll."""
    command = Path(f"/proc/{pid}/cmdline").read_text()
    descriptors = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return "spawn_main" not in command and "resource_tracker" not in command and any("eventpoll" in target for target in descriptors)


def test_a_taken_port_is_named_before_anything_starts():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        done = subprocess.run(
            [sys.executable, "-m", "ebjdat_serve.cli", "serve", "--port", str(other.getsockname()[1])],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 2
    assert "--port" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"), [("weights.safetensors", "a graph was made from other weights"), ("selftest.safetensors", "self-test failed")]
)
def test_what_does_not_belong_together_fails_verification(tmp_path, name, said):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED, folder)
    content = bytearray((folder / name).read_bytes())
    content[-4000:] = bytes(4000)  # a hash that matches, content that does not
    (folder / name).write_bytes(content)
    Bundle.draft(folder).update(name)
    done = subprocess.run(
        [sys.executable, "-m", "ebjdat_serve.cli", "verify", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert said in done.stderr


def test_the_torch_engine_serves_the_same_answers(tmp_path, live, picture):
    with serving(SHIPPED, tmp_path / "log", "--engine", "torch", "--device", "cpu") as server:
        wait_ready(server)
        assert httpx2.get(f"{server.url}/info").json()["engine"] == "torch"
        by_torch = httpx2.post(f"{server.url}/energy", content=picture, timeout=30).json()
        by_onnx = httpx2.post(f"{live.url}/energy", content=picture, timeout=30).json()
        assert by_torch["energy"] == pytest.approx(by_onnx["energy"], rel=1e-4)
        assert by_torch["joint_energy"] == pytest.approx(by_onnx["joint_energy"], rel=1e-3, abs=1e-4)
