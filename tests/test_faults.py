"""Faults: a killed worker, a client that leaves, a full queue, a stop signal, wrong wishes at the prompt."""

import contextlib
import os
import re
import select
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
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


LONG = ("--device", "cpu", "--max-steps", "1000")


def workers(server):
    """Process ids of the workers: classify's first."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8") for pid in sorted(server.children())}
    return [pid for pid, command in commands.items() if "spawn_main" in command]


def chain_steps_left(server):
    return httpx2.get(f"{server.url}/info", timeout=30).json()["load"]["generate"]["chain_steps_left"]


def drawing(server, chains=1):
    """Wait until so many chains are under way: on a busy machine half a second may not be enough."""
    end = time.monotonic() + 30
    while httpx2.get(f"{server.url}/info", timeout=30).json()["load"]["generate"]["chains"] < chains:
        assert time.monotonic() < end
        time.sleep(0.05)


def kill_workers(server):
    for pid in workers(server):
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
        assert len(tree) == 5  # main, HTTP, two workers, multiprocessing's resource tracker
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
        drawing(server, 8)
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


def test_a_worker_killed_at_work_costs_its_requests_only_and_at_once(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        answers = []

        def ask():
            answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 900}, timeout=100)
            answers.append((answer.status_code, answer.headers.get("retry-after"), time.monotonic()))

        thread = threading.Thread(target=ask)
        thread.start()
        drawing(server, 8)
        killed = time.monotonic()
        os.kill(workers(server)[1], signal.SIGKILL)
        assert httpx2.post(f"{server.url}/classify", content=picture, timeout=30).status_code == 200
        # what comes while there is no worker waits for the next
        assert httpx2.get(f"{server.url}/generate", params={"class": 1, "steps": 2}, timeout=30).status_code == 200
        thread.join(60)
        status, retry_after, at = answers[0]
        assert (status, retry_after) == (503, "3")
        assert at - killed < 2
        wait_ready(server)


def test_a_worker_that_hangs_is_replaced(tmp_path, picture, monkeypatch):
    """A stopped process says nothing; its request is answered at the deadline, and the worker is killed."""
    script = tmp_path / "impatient.py"
    script.write_text(
        "import sys\n"
        "from ebjdat_serve.server import lanes\n"
        "lanes.HANGS = 2.0\n"
        "from ebjdat_serve.cli import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    with serving(SHIPPED, tmp_path / "log", executable=(sys.executable, str(script))) as server:
        os.kill(workers(server)[0], signal.SIGSTOP)
        first = httpx2.post(f"{server.url}/classify", content=picture, timeout=30)
        assert first.status_code == 503
        assert httpx2.post(f"{server.url}/classify", content=picture, timeout=30).status_code == 200
        assert "has not said a word" in server.log.read_text()


def test_clients_that_leave_take_their_chains_along(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        host, port = server.url.removeprefix("http://").split(":")
        for kind in ("", "&stream=true"):
            for _ in range(12):  # more than may be under way: leavers must not fill it
                with socket.create_connection((host, int(port))) as client:
                    client.sendall(f"GET /generate?class=1&n=8&steps=400{kind} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    time.sleep(0.2)
            time.sleep(0.5)
            assert chain_steps_left(server) == 0
        begin = time.monotonic()
        answer = httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=60)
        assert answer.status_code == 200
        assert time.monotonic() - begin < 2


def test_a_short_request_does_not_wait_for_long_ones(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:

        def draw(**query):
            begin = time.monotonic()
            answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "seed": 3, **query}, timeout=120)
            return answer, time.monotonic() - begin

        alone, _ = draw(steps=20)
        done = []
        threads = [threading.Thread(target=lambda seed=seed: done.append(draw(steps=600, seed=seed))) for seed in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        busy, seconds = draw(steps=20)
        assert busy.content == alone.content
        assert not done
        for thread in threads:
            thread.join()
        assert all(answer.status_code == 200 for answer, _ in done)
        assert seconds < min(took for _, took in done) / 3


def test_too_many_chains_or_too_much_work_answers_429_with_retry_after(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        answers = []

        def ask(n, steps):
            answers.append(httpx2.get(f"{server.url}/generate", params={"class": 1, "n": n, "steps": steps}, timeout=120))

        threads = [threading.Thread(target=ask, args=(64, 20)) for _ in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begin = time.monotonic()
        assert httpx2.post(f"{server.url}/classify", content=picture, timeout=30).status_code == 200
        assert time.monotonic() - begin < 5
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
        answers.clear()
        threads = [threading.Thread(target=ask, args=(8, 1000)) for _ in range(8)]
        for thread in threads:
            thread.daemon = True
            thread.start()
        end = time.monotonic() + 20
        while len(answers) < 4 and time.monotonic() < end:
            time.sleep(0.1)
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert "chain-steps to go" in refused[0].json()["detail"]
        assert int(refused[0].headers["retry-after"]) >= 1
        # a short one overtakes them, and is not refused for their sake
        assert httpx2.get(f"{server.url}/generate", params={"class": 1, "steps": 20}, timeout=60).status_code == 200
        kill_workers(server)  # the long ones need not be waited for
        for thread in threads:
            thread.join(30)


def test_the_deadline_is_kept_while_chains_run(tmp_path):
    script = tmp_path / "short.py"
    script.write_text(
        "import sys\n"
        "from ebjdat_serve.server import settings\n"
        "settings.Settings.__init__.__defaults__ = tuple("
        "2.0 if value == 120.0 else value for value in settings.Settings.__init__.__defaults__)\n"
        "from ebjdat_serve.cli import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    with serving(SHIPPED, tmp_path / "log", *LONG, executable=(sys.executable, str(script))) as server:
        begin = time.monotonic()
        answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 900}, timeout=60)
        assert answer.status_code == 504
        assert 1.9 < time.monotonic() - begin < 4
        time.sleep(1)
        assert chain_steps_left(server) == 0


def test_bodies_that_never_end_take_nobodys_place(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        heads = [f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf".encode() for path in ("classify", "generate")]
        clients = [socket.create_connection((host, int(port))) for _ in range(2 * Settings().classify_queue + 20)]
        for i, client in enumerate(clients):
            client.sendall(heads[i % 2])
        time.sleep(1)
        assert httpx2.post(f"{server.url}/classify", content=picture, timeout=10).status_code == 200
        assert httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200
        for client in clients:
            client.close()


def test_a_full_classify_queue_answers_503_with_retry_after_and_the_rest_goes_on(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        stopped = workers(server)[0]
        os.kill(stopped, signal.SIGSTOP)
        ask = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(picture), picture)
        clients = [socket.create_connection((host, int(port))) for _ in range(Settings().classify_queue)]
        for client in clients:
            client.sendall(ask)
        time.sleep(1)
        refused = httpx2.post(f"{server.url}/classify", content=picture, timeout=10)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "classify_queue" in refused.json()["detail"]
        assert httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200
        os.kill(stopped, signal.SIGCONT)
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"
            client.close()


def memory(pid):
    return (
        next(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
            if line.startswith("VmRSS")
        )
        / 1024
    )


def http_process(server):
    port = int(server.url.rsplit(":", 1)[1])
    return next(pid for pid in server.children() if listens(pid, port))


@pytest.mark.parametrize(
    ("first", "endless"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: " + b"b" * 60_000 + b"\r\n"),
        (b"GET /generate?class=1&n=8&steps=900 HTTP/1.1\r\nHost: x\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2000),
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\nContent-Type: text/plain\r\n\r\n", b"x" * 60_000),
    ],
    ids=["trailers", "pipelined requests", "the body of a request that was refused"],
)
def test_endless_bytes_end_the_connection_and_take_no_memory(tmp_path, first, endless):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        host, port = server.url.removeprefix("http://").split(":")
        http = http_process(server)
        before, sent = memory(http), 0
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(first)
            time.sleep(0.5)
            with pytest.raises(OSError):
                while sent < 200 * 2**20:
                    client.sendall(endless)
                    sent += len(endless)
        assert memory(http) - before < 30
        time.sleep(0.5)
        assert chain_steps_left(server) == 0
        assert httpx2.get(f"{server.url}/health").status_code == 200


def test_a_slow_upload_is_cut_off_long_before_a_large_one_that_comes(tmp_path, monkeypatch):
    with serving(SHIPPED, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            begin = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - begin < 25 and not select.select([client], [], [], 0.3)[0]:
                    client.sendall(b"x")
            assert b" 408 " in client.recv(1000)
            assert time.monotonic() - begin < 20


def test_a_picture_of_countless_pieces_is_refused_and_keeps_nobody_waiting(live):
    import zlib

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 100)))
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 8, 0, 0, 0, 8, 8, 2, 0, 0, 0]))
    pixels_ = chunk(b"IDAT", zlib.compress(bytes(8 * 25)))
    end = chunk(b"IEND", b"")
    for picture in (
        head + profile * 3000 + pixels_ + end,
        head + pixels_ + profile * 400 + end,
        head + chunk(b"tEXt", b"") * 1_000_000 + pixels_ + end,
        b"\xff\xd8" + b"\xff" * 10_000_000,
        b"\xff\xd8" + b"\xff\xe5\0\2" * 3_000_000,
    ):
        begin = time.monotonic()
        answer = httpx2.post(f"{live.url}/classify", content=picture, timeout=60)
        assert answer.status_code == 422
        assert "pieces" in answer.json()["detail"]
        assert time.monotonic() - begin < 3
    assert httpx2.post(f"{live.url}/classify", content=head + profile + pixels_ + end).status_code == 200


def test_a_worker_that_dies_before_it_says_hello_costs_only_itself(tmp_path, picture, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with serving(SHIPPED, tmp_path / "log") as server:
        (wire,) = tmp_path.glob("ebjdat-*/wire")
        for said in (b"", b"\0\0"):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(wire))
                stranger.sendall(said)
        time.sleep(0.5)
        assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200
    assert not list(tmp_path.glob("ebjdat-*"))


def test_a_stop_signal_to_the_whole_group_drains_too(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        tree, answers = [server.process.pid, *server.children()], []
        query = {"class": 1, "n": 8, "steps": 60}
        thread = threading.Thread(target=lambda: answers.append(httpx2.get(f"{server.url}/generate", params=query, timeout=60).status_code))
        thread.start()
        drawing(server, 8)
        os.killpg(server.process.pid, signal.SIGTERM)
        thread.join(30)
        assert answers == [200]
        assert server.process.wait(20) == 0
        assert gone(tree)


def test_an_upload_under_way_is_answered_before_the_end(tmp_path, picture):
    with serving(SHIPPED, tmp_path / "log") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(picture), picture[:100]))
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.7)
            client.sendall(picture[100:])
            assert client.recv(12) == b"HTTP/1.1 200"


def test_a_stream_that_nobody_reads_costs_no_previews_and_ends_at_its_deadline(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.sendall(b"GET /generate?class=1&n=4&steps=100&scale=16&stream=true&every=5 HTTP/1.1\r\nHost: x\r\n\r\n")
            end = time.monotonic() + 60
            time.sleep(0.5)
            while chain_steps_left(server) and time.monotonic() < end:
                time.sleep(0.2)
            assert chain_steps_left(server) == 0  # the chains arrived, read or not
            assert httpx2.get(f"{server.url}/info").json()["load"]["generate"]["chains"] == 0
            assert httpx2.get(f"{server.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200


def test_half_sent_requests_and_slow_readers_do_not_keep_the_server_from_stopping(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG) as server:
        tree = [server.process.pid, *server.children()]
        host, port = server.url.removeprefix("http://").split(":")
        clients = [socket.create_connection((host, int(port))) for _ in range(3)]
        clients[0].sendall(b"GET /health HT")
        clients[1].sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
        clients[2].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        clients[2].sendall(b"GET /generate?class=1&n=16&steps=1&scale=16&format=png HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(3)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begin < 10
        assert gone(tree)
        for client in clients:
            client.close()


def test_long_chains_are_cut_off_with_an_answer(tmp_path):
    script = tmp_path / "hasty.py"
    script.write_text(
        "import sys\n"
        "from ebjdat_serve.server import seam\n"
        "seam.LONG_GRACE = 3.0\n"
        "from ebjdat_serve.cli import main\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main(sys.argv[1:]))\n"
    )
    with serving(SHIPPED, tmp_path / "log", *LONG, executable=(sys.executable, str(script))) as server:
        answers = []

        def ask(**query):
            answers.append(httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 2, "steps": 900, **query}, timeout=60))

        threads = [threading.Thread(target=ask), threading.Thread(target=ask, kwargs={"stream": True})]
        for thread in threads:
            thread.start()
        drawing(server, 4)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert sorted(answer.status_code for answer in answers) == [200, 503]
        assert all("the server is stopping" in answer.text for answer in answers)
        assert server.process.wait(20) == 0
        assert 3 < time.monotonic() - begin < 8


def test_the_death_of_the_main_process_ends_the_others(tmp_path):
    with serving(SHIPPED, tmp_path / "log") as server:
        tree = [server.process.pid, *server.children()]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        assert gone(tree)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["serve", "/nowhere"], "neither a bundle"),
        (["serve", "--alpha", "0.0001"], "1/(n+1)"),
        (["serve", "--port", "80"], "1024 to 65535"),
        (["serve", "--classify-workers", "0"], "--classify-workers must be at least 1"),
        (["serve", "--generate-workers", "-1"], "--generate-workers must be at least 0"),
        (["serve", "--max-steps", "-1"], "--max-steps must be at least 0"),
        (["serve", "--threads", "0"], "--threads must be at least 1"),
        (["serve", "--trust", "/nowhere.pub.pem"], "cannot be read as a public key"),
        (["rollback", "/nowhere"], "cannot be changed"),
        (["publish", "/nowhere", "/tmp/never"], "neither a bundle"),
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
    command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
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
