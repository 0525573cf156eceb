"""Tests of faults: a killed worker, a disconnected client, a full queue, a stop signal, invalid command lines."""

import asyncio
import contextlib
import http.client
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
import uvicorn
from uvicorn.server import ServerState

from benchmarks.load import descendants
from ebjdat_serve import cli
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.read import http_protocol
from ebjdat_serve.server.read.http_protocol import bounded_protocol
from ebjdat_serve.server.settings import DECODERS, SHIPPED, Settings
from ebjdat_serve.server.supervisor import Supervisor
from ebjdat_serve.server.worker_sockets import WorkerSockets
from tests.conftest import HTTP, LONG, ROOT, free_port, serving, until, wait_ready


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def name(pid):
    """Name of a process as ps shows it, none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def workers(server):
    """Process ids of the workers by their kind: classify's first."""
    names = {pid: name(pid) for pid in server.children()}
    return sorted((pid for pid in names if names[pid] in ("ebjdat-classify", "ebjdat-generate")), key=names.__getitem__)


def chain_steps_left(server):
    return server.info()["load"]["generate"]["chain_steps_left"]


def drawing(server, chains=1):
    """Wait until so many chains are under way: on a busy machine half a second may not be enough."""
    until(lambda: server.info()["load"]["generate"]["chains"] >= chains)


def idle(server):
    """Wait until no chain is left."""
    until(lambda: chain_steps_left(server) == 0)


def busy(server, kind, requests):
    """Wait until so many requests of a kind are held by the server."""
    until(lambda: server.info()["load"][kind]["requests"] >= requests)


def connect(server, timeout=20):
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout)


@pytest.fixture(scope="module")
def battered(tmp_path_factory):
    """A server that waits for nobody for long, and whose workers the tests kill and stop; each leaves it with workers that answer."""
    variables = {
        "HEADER_TIMEOUT": "1",
        "UPLOAD_GRACE": "1",
        "READ_TIMEOUT": "1",
        "MAX_HEADERS": "3000",
        "KEEP_ALIVE": "1",
        "STREAM_HEARTBEAT": "0.1",
    }
    bounds = ("--worker-timeout", "3", "--body-timeout", "2", "--keep-alive", "2")
    with pytest.MonkeyPatch.context() as patch:
        for name, text in variables.items():
            patch.setenv(f"EBJDAT_{name}", text)
        with serving(SHIPPED, tmp_path_factory.mktemp("battered") / "log", *LONG, *bounds) as server:
            patch.undo()  # or the servers of other tests would be impatient too
            yield server


def kill_workers(server):
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)


def gone(pids):
    until(lambda: not any(alive(pid) for pid in pids), 15)


@pytest.mark.parametrize(
    "send",
    [
        lambda server: server.send_signal(signal.SIGTERM),
        pytest.param(lambda server: server.send_signal(signal.SIGINT), marks=pytest.mark.slow),
        pytest.param(lambda server: os.killpg(server.pid, signal.SIGTERM), marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "SIGINT", "to the group"],
)
def test_a_stop_signal_drains_and_leaves_no_process_behind(tmp_path, picture, send):
    """A drawing and an upload under way are answered before the end."""
    with serving(SHIPPED, tmp_path / "log", "--max-steps", "80") as server, connect(server) as client:
        answers = []
        until(lambda: len(server.children()) == 6 + DECODERS)  # HTTP, two workers, multiprocessing's resource tracker, zygote, decoders
        tree = [server.process.pid, *server.children()]
        query = {"class": 1, "n": 2, "steps": 80}
        thread = threading.Thread(target=lambda: answers.append(httpx2.get(f"{server.url}/generate", params=query, timeout=60).status_code))
        thread.start()
        client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(picture), picture[:100]))
        drawing(server, 2)
        send(server.process)
        until(lambda: deaf(server))
        client.sendall(picture[100:])
        assert client.recv(12) == b"HTTP/1.1 200"
        thread.join(30)
        assert answers == [200]
        assert server.process.wait(20) == 0
        gone(tree)
        assert "Traceback" not in server.log.read_text()


def deaf(server):
    """Whether the server answers no new connection any more."""
    try:
        HTTP.get(f"{server.url}/health", timeout=1)
    except httpx2.TransportError:
        return True
    return False


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
    until(
        lambda: any(
            "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8") for pid in descendants(process.pid) if alive(pid)
        )
    )
    process.send_signal(signal.SIGTERM)  # the workers are being spawned
    process.wait(20)
    listing = subprocess.run(["ps", "-eo", "pid,sid"], capture_output=True, text=True, check=True).stdout
    left = [int(pid) for pid, sid in re.findall(r"(\d+)\s+(\d+)", listing) if int(sid) == process.pid]
    gone(left)


STOPPED_IN_THE_FORK = """
import os, signal, sys
from ebjdat_serve import cli

def late():
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(10))  # the handler runs here, and Python drops what it raises in such a hook

if __name__ == "__main__":
    os.register_at_fork(after_in_child=late)
    sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_stop_signal_while_the_http_process_is_forked_is_not_lost(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPPED_IN_THE_FORK)
    command = [sys.executable, str(script), "serve", str(SHIPPED), "--port", str(free_port()), "--device", "cpu", "--threads", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert "Exception ignored" in done.stderr  # the signal came in the hook
    assert (done.returncode, "the HTTP process died" in done.stderr) == (2, True)


def test_a_killed_worker_is_replaced_and_others_go_on(battered, picture):
    before = httpx2.post(f"{battered.url}/classify", content=picture).json()
    kill_workers(battered)

    def answered():
        try:
            return httpx2.post(f"{battered.url}/classify", content=picture, timeout=30).status_code == 200
        except httpx2.TransportError:
            return False

    until(answered, 40)
    assert httpx2.post(f"{battered.url}/classify", content=picture, timeout=30).json() == before
    assert httpx2.get(f"{battered.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200


def test_a_worker_killed_at_work_costs_its_requests_only_and_at_once(battered, picture):
    wait_ready(battered)
    answers = []

    def ask():
        answer = httpx2.get(f"{battered.url}/generate", params={"class": 1, "n": 8, "steps": 900}, timeout=100)
        answers.append((answer.status_code, answer.headers.get("retry-after"), time.monotonic()))

    thread = threading.Thread(target=ask)
    thread.start()
    drawing(battered, 8)
    killed = time.monotonic()
    os.kill(workers(battered)[1], signal.SIGKILL)
    assert httpx2.post(f"{battered.url}/classify", content=picture, timeout=30).status_code == 200
    thread.join(60)
    status, retry_after, at = answers[0]
    assert (status, retry_after) == (503, "3")
    assert at - killed < 2
    # what comes while there is no worker waits for the next
    answer = httpx2.get(f"{battered.url}/generate", params={"class": 1, "steps": 2}, timeout=30)
    assert answer.status_code == 200, answer.text
    wait_ready(battered)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(battered, picture):
    """A stopped process says nothing: after --worker-timeout it is killed, and its request is answered."""
    wait_ready(battered)
    os.kill(workers(battered)[0], signal.SIGSTOP)
    first = httpx2.post(f"{battered.url}/classify", content=picture, timeout=30)
    assert first.status_code == 503
    assert httpx2.post(f"{battered.url}/classify", content=picture, timeout=30).status_code == 200
    silent = re.search(r"has not said a word for (\d+) s", battered.log.read_text())
    assert silent and int(silent[1]) >= 3  # more where the machine is busy


def test_who_closes_the_sending_side_is_taken_for_gone(long_live):
    """As by uvicorn and nginx: it looks as a closed connection does, whose work would else go on."""
    with connect(long_live) as client:
        client.sendall(b"GET /generate?class=1&n=2&steps=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        drawing(long_live, 2)
        client.shutdown(socket.SHUT_WR)
        assert closed_after(client)[1] == b""
    idle(long_live)


def test_clients_that_leave_take_their_chains_along(long_live):
    for kind in ("", "&stream=true"):
        for _ in range(24):  # more than may be under way: leavers must not fill it
            with connect(long_live) as client:
                client.sendall(f"GET /generate?class=1&n=8&steps=100{kind} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                drawing(long_live, 8)
        idle(long_live)
    begin = time.monotonic()
    answer = httpx2.get(f"{long_live.url}/generate", params={"class": 0, "steps": 2}, timeout=60)
    assert answer.status_code == 200
    assert time.monotonic() - begin < 2


@pytest.mark.slow
def test_a_short_request_does_not_wait_for_long_ones(long_live):
    def draw(**query):
        begin = time.monotonic()
        answer = httpx2.get(f"{long_live.url}/generate", params={"class": 1, "seed": 3, **query}, timeout=120)
        return answer, time.monotonic() - begin

    alone, _ = draw(steps=20)
    done = []
    threads = [threading.Thread(target=lambda seed=seed: done.append(draw(steps=300, seed=seed))) for seed in range(4)]
    for thread in threads:
        thread.start()
    drawing(long_live, 4)
    busy, seconds = draw(steps=20)
    assert busy.content == alone.content
    assert not done
    for thread in threads:
        thread.join()
    assert all(answer.status_code == 200 for answer, _ in done)
    assert seconds < min(took for _, took in done) / 3


@pytest.mark.slow
def test_too_many_chains_answer_429_with_retry_after(long_live, picture):
    answers = []

    def ask():
        answers.append(httpx2.get(f"{long_live.url}/generate", params={"class": 1, "n": 64, "steps": 20}, timeout=120))

    threads = [threading.Thread(target=ask) for _ in range(5)]
    for thread in threads:
        thread.start()
    drawing(long_live, 128)
    begin = time.monotonic()
    assert httpx2.post(f"{long_live.url}/classify", content=picture, timeout=30).status_code == 200
    assert time.monotonic() - begin < 5
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers if answer.status_code == 429)


def test_too_much_work_answers_429_and_a_short_request_is_not_refused_for_its_sake(long_live):
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(long_live)) for _ in range(8)]
        for client in clients:
            client.sendall(b"GET /generate?class=1&n=8&steps=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        refused = []
        until(lambda: refused.extend(select.select(clients, [], [], 0)[0]) or refused)
        answer = http.client.HTTPResponse(refused[0])
        answer.begin()
        assert answer.status == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert b"chain-steps to go" in answer.read()
        assert httpx2.get(f"{long_live.url}/generate", params={"class": 1, "steps": 20}, timeout=60).status_code == 200


@pytest.mark.slow
def test_the_deadline_is_kept_while_chains_run(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG, "--generate-deadline", "2") as server:
        begin = time.monotonic()
        answer = httpx2.get(f"{server.url}/generate", params={"class": 1, "n": 8, "steps": 900}, timeout=60)
        assert answer.status_code == 504
        assert 1.9 < time.monotonic() - begin < 4
        idle(server)


def test_bodies_that_never_end_take_nobodys_place(long_live, picture):
    heads = [f"POST /{path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf".encode() for path in ("classify", "generate")]
    before = connections(http_process(long_live))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(long_live)) for _ in range(2 * Settings().classify_queue + 20)]
        for i, client in enumerate(clients):
            client.sendall(heads[i % 2])
        until(lambda: connections(http_process(long_live)) >= before + len(clients))
        assert httpx2.post(f"{long_live.url}/classify", content=picture, timeout=10).status_code == 200
        assert httpx2.get(f"{long_live.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200


def test_a_full_classify_queue_answers_503_with_retry_after_and_the_rest_goes_on(long_live, picture):
    stopped = workers(long_live)[0]
    ask = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(picture), picture)
    with contextlib.ExitStack() as stack:
        os.kill(stopped, signal.SIGSTOP)
        stack.callback(os.kill, stopped, signal.SIGCONT)
        clients = [stack.enter_context(connect(long_live)) for _ in range(Settings().classify_queue)]
        for client in clients:
            client.sendall(ask)
        busy(long_live, "classify", len(clients))
        refused = httpx2.post(f"{long_live.url}/classify", content=picture, timeout=10)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "--classify-queue" in refused.json()["detail"]
        assert httpx2.get(f"{long_live.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200
        os.kill(stopped, signal.SIGCONT)
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"


def connections(pid):
    """How many sockets a process has open."""
    return sum(os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:") for name in os.listdir(f"/proc/{pid}/fd"))


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
def test_endless_bytes_end_the_connection_and_take_no_memory(long_live, first, endless):
    pid = http_process(long_live)
    before, sent = memory(pid), 0
    with connect(long_live) as client:
        client.sendall(first)
        if b"/generate" in first:
            drawing(long_live, 8)
        with pytest.raises(OSError):
            while sent < 200 * 2**20:
                client.sendall(endless)
                sent += len(endless)
    assert memory(pid) - before < 30
    idle(long_live)
    assert httpx2.get(f"{long_live.url}/health").status_code == 200


def closed_after(client, seconds=20):
    """Return after how many seconds the server closes a connection, and what it sent before."""
    begin, received = time.monotonic(), b""
    client.settimeout(seconds)
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(2**16):
            received += data
    return time.monotonic() - begin, received


@pytest.mark.parametrize(
    ("sent", "at_least", "answered"),
    [
        (b"GET /health HT", 0.9, b"HTTP/1.1 408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 3000 + b"\r\n\r\n", 0, b"HTTP/1.1 431"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 1.9, b"HTTP/1.1 200"),  # an idle connection: the option wins over the variable
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000, 1.9, b"HTTP/1.1 408"),  # half a body
    ],
    ids=["half of the headers", "long headers", "idle", "half a body"],
)
def test_the_bounds_of_a_connection_are_settings(battered, sent, at_least, answered):
    with connect(battered) as client:
        client.sendall(sent)
        seconds, received = closed_after(client)
    assert received.startswith(answered) and bool(received) == bool(answered)
    assert at_least <= seconds < at_least + 5


def test_a_slow_upload_is_cut_off_long_before_a_large_one_that_comes(battered):
    with connect(battered) as client:
        client.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 10 and not select.select([client], [], [], 0.1)[0]:
                client.sendall(b"x")
        assert b" 408 " in client.recv(1000)
        assert 0.9 < time.monotonic() - begin < 1.9


def test_a_client_that_reads_nothing_is_cut_off():
    """The protocol alone: the kernel would keep whatever a server of ours has to say."""
    size = 64 * 2**20

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size)})

    async def run():
        config = uvicorn.Config(app, http=bounded_protocol(Settings(read_timeout=0.2)), lifespan="off", log_config=None)
        config.load()
        loop = asyncio.get_running_loop()
        factory = lambda: config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # noqa: E731
        async with await loop.create_server(factory, "127.0.0.1", 0) as server:
            with socket.create_connection(server.sockets[0].getsockname()) as client:
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                async with asyncio.timeout(10):
                    while not http_protocol.connections():
                        await asyncio.sleep(0.01)
                    while http_protocol.connections():
                        await asyncio.sleep(0.01)
                _, received = await loop.run_in_executor(None, closed_after, client)
        assert len(received) < size

    asyncio.run(run())


@pytest.mark.slow
def test_a_stream_says_that_it_is_still_there(battered):
    answer = httpx2.get(f"{battered.url}/generate", params={"class": 1, "steps": 80, "n": 8, "stream": True, "every": 80}, timeout=60)
    assert ": still there\n\n" in answer.text
    assert "event: done" in answer.text


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
        assert "too many" in answer.json()["detail"]
        assert time.monotonic() - begin < 3
    assert httpx2.post(f"{live.url}/classify", content=head + profile + pixels_ + end).status_code == 200


def test_a_worker_that_dies_before_it_says_hello_costs_only_itself():
    sockets, accepted = WorkerSockets(), []

    async def accept(supervisor):
        with sockets.accepting(lambda connection: accepted.append(asyncio.ensure_future(supervisor._accept(connection)))):
            while len(accepted) < 2 or not all(task.done() for task in accepted):
                await asyncio.sleep(0.01)

    for said in (b"", b"\0\0"):
        with sockets.connect() as worker:
            worker.sendall(said)
    asyncio.run(asyncio.wait_for(accept(Supervisor({}, sockets)), 20))
    assert [task.exception() for task in accepted] == [None, None]


@pytest.mark.slow
def test_nothing_that_a_server_needs_is_in_a_file_and_nothing_stays_of_one_that_is_killed(tmp_path, picture, monkeypatch):
    """A cleaner of temporary folders takes what it finds; then a worker dies, and at last the main process."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with serving(SHIPPED, tmp_path / "log") as server:
        assert not list(temporary.iterdir())
        assert not [held for pid in (server.process.pid, *server.children()) for held in named(pid)]
        shutil.rmtree(temporary)
        killed = workers(server)[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(workers(server)) == 2 and killed not in workers(server))
        wait_ready(server)
        assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200
        until(lambda: len(server.decoders()) == 1 + DECODERS)
        tree = [server.process.pid, *server.children()]
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
        gone(tree)
    assert not temporary.exists()


def named(pid):
    """Return what a process holds open that others find by a name: Unix sockets, abstract ones too, and shared memory."""
    rows = [line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:]]
    sockets = {f"socket:[{row[6]}]": row[7] for row in rows if len(row) == 8}
    links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return [sockets.get(link, link) for link in links if link in sockets or link.startswith("/dev/shm")]


@pytest.mark.slow
def test_a_stream_that_nobody_reads_costs_no_previews_and_ends_at_its_deadline(long_live):
    with connect(long_live) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.sendall(b"GET /generate?class=1&n=4&steps=100&scale=16&stream=true&every=5 HTTP/1.1\r\nHost: x\r\n\r\n")
        drawing(long_live, 4)
        idle(long_live)  # the chains arrived, read or not
        assert long_live.info()["load"]["generate"]["chains"] == 0
        assert httpx2.get(f"{long_live.url}/generate", params={"class": 0, "steps": 2}, timeout=30).status_code == 200


@pytest.mark.slow
def test_half_sent_requests_and_slow_readers_do_not_keep_the_server_from_stopping(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG, "--graceful-timeout", "1") as server, contextlib.ExitStack() as stack:
        tree = [server.process.pid, *server.children()]
        clients = [stack.enter_context(connect(server)) for _ in range(3)]
        clients[0].sendall(b"GET /health HT")
        clients[1].sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf")
        clients[2].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        clients[2].sendall(b"GET /generate?class=1&n=16&steps=1&scale=16&format=png HTTP/1.1\r\nHost: x\r\n\r\n")
        assert select.select(clients[2:], [], [], 30)[0]  # its answer is on the way, and more than it takes in
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert 1 < time.monotonic() - begin < 5
        for client in clients[:2]:
            _, received = closed_after(client)
            assert received.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: 5\r\n" in received
            assert received.endswith(b'try again when it is back"}')
        gone(tree)


@pytest.mark.slow
def test_long_chains_are_cut_off_with_an_answer(tmp_path):
    with serving(SHIPPED, tmp_path / "log", *LONG, "--generate-graceful-timeout", "2") as server:
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
        assert 2 < time.monotonic() - begin < 7


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
        (["serve", "--worker-timeout", "0"], "--worker-timeout must be seconds above 0"),
        (["serve", "--generate-deadline", "nan"], "--generate-deadline must be seconds above 0"),
        (["serve", "--trust", "/nowhere.pub.pem"], "cannot be read as a public key"),
        (["rollback", "/nowhere"], "cannot be changed"),
        (["publish", "/nowhere", "/tmp/never"], "neither a bundle"),
        (["inspect", "/nowhere"], "neither a bundle"),
        (["verify", "/nowhere"], "neither a bundle"),
    ],
)
@pytest.mark.usefixtures("no_start")
def test_a_wrong_wish_is_an_error_at_the_prompt(arguments, said, capsys):
    try:
        status = cli.main(arguments)
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_an_error_at_the_prompt_has_no_traceback():
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", "/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "neither a bundle" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_named_not_replaced():
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "[gpu]" in done.stderr


def test_the_death_of_the_http_process_ends_the_server(tmp_path):
    with serving(SHIPPED, tmp_path / "log", "--device", "cpu", "--generate-workers", "0") as server:
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
        gone(tree)


def listens(pid, port):
    """Whether a process runs uvicorn: it is forked, so its command line is its parent's, and it serves, so it has an epoll."""
    command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    descriptors = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return "spawn_main" not in command and "resource_tracker" not in command and any("eventpoll" in target for target in descriptors)


@pytest.mark.usefixtures("no_start")
def test_a_taken_port_is_named_before_anything_starts(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert cli.main(["serve", "--port", str(other.getsockname()[1])]) == 2
    assert "--port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"), [("weights.safetensors", "a graph was exported from other weights"), ("selftest.safetensors", "self-test failed")]
)
def test_what_does_not_belong_together_fails_verification(tmp_path, name, said, capsys):
    folder = tmp_path / "bundle"
    shutil.copytree(SHIPPED, folder)
    content = bytearray((folder / name).read_bytes())
    content[-4000:] = bytes(4000)  # a hash that matches, content that does not
    (folder / name).write_bytes(content)
    Bundle.draft(folder).update(name)
    assert cli.main(["verify", str(folder)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_the_torch_engine_serves_the_same_answers(tmp_path, live, picture):
    with serving(SHIPPED, tmp_path / "log", "--engine", "torch", "--device", "cpu") as server:
        wait_ready(server)
        assert httpx2.get(f"{server.url}/info").json()["engine"] == "torch"
        by_torch = httpx2.post(f"{server.url}/energy", content=picture, timeout=30).json()
        by_onnx = httpx2.post(f"{live.url}/energy", content=picture, timeout=30).json()
        assert by_torch["energy"] == pytest.approx(by_onnx["energy"], rel=1e-4)
        assert by_torch["joint_energy"] == pytest.approx(by_onnx["joint_energy"], rel=1e-3, abs=1e-4)
