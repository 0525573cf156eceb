"""Tests of our contracts with LitServe's private names, which name the one that an upgrade breaks."""

import os
import signal
import subprocess
import sys
import time

import httpx2
import litserve as ls
import pytest
from litserve.test_examples import SimpleLitAPI

from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import serving, until
from tests.test_faults import workers

RECORDING = """
import os, sys
from ebjdat_serve.cli import main
from ebjdat_serve.server.litserve_adapter import Server

def recorded(name):
    usual = getattr(Server, name)
    def call(self, *arguments, **options):
        with open(RECORD, "a") as file:
            file.write(f"{name} {os.getpid()}\\n")
        return usual(self, *arguments, **options)
    return call

OURS = [name for name in vars(Server) if hasattr(Server.__mro__[1], name) and callable(getattr(Server, name)) and not name.startswith("__")]
for name in OURS:
    setattr(Server, name, recorded(name))
if __name__ == "__main__":
    print("overridden", *OURS, flush=True)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_litserve_calls_each_method_that_we_override_where_we_expect_it(tmp_path):
    """A method that an upgrade renames would stand in our class, and nobody would call it."""
    script, record = tmp_path / "recording.py", tmp_path / "record"
    script.write_text(f"RECORD = {str(record)!r}\n{RECORDING}")

    def said():
        return [line.split() for line in record.read_text().splitlines()]

    with serving(SHIPPED, tmp_path / "log", executable=(sys.executable, str(script))) as server:
        started = [name for name, _ in said()]
        killed = workers(server)[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: len(said()) > len(started))
        until(lambda: len(workers(server)) == 2 and killed not in workers(server))
        assert [name for name, _ in said()[len(started) :]] == ["launch_single_inference_worker"]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    (overridden,) = [line.split()[1:] for line in (tmp_path / "log").read_text().splitlines() if line.startswith("overridden")]
    where = {name: int(pid) for name, pid in said()}
    assert set(where) == set(overridden)
    assert started[0] == "register_endpoints"
    assert [name for name in started if name in ("_init_manager", "verify_worker_status", "_start_server")] == [
        "_init_manager", "verify_worker_status", "_start_server",
    ]  # fmt: skip
    assert said()[-1][0] == "_perform_graceful_shutdown"
    assert {name for name, pid in where.items() if pid != server.process.pid} == {"lifespan"}  # in the HTTP process


def test_each_attribute_that_we_set_is_one_that_litserve_keeps():
    plain = ls.LitServer(SimpleLitAPI(), accelerator="cpu")
    for name in ("middlewares", "monitor_internal", "uvicorn_graceful_timeout", "litapi_connector", "app"):
        assert name in vars(plain), name
    manager = plain._init_manager(1)
    try:
        for name in ("workers_setup_status", "_shutdown_event", "litapi_request_queues", "_transport"):
            assert name in vars(plain), name
    finally:
        manager.shutdown()


def test_answers_are_not_compressed(live):
    """LitServe's middleware for it would be in the way of every image."""
    answer = httpx2.get(f"{live.url}/info", headers={"Accept-Encoding": "gzip"})
    assert len(answer.content) > 10_000
    assert "content-encoding" not in answer.headers


@pytest.mark.slow
def test_a_stop_that_python_drops_is_given_again(tmp_path):
    """A signal whose exception is raised inside a destructor is lost; two seconds later it comes again."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, signal, time\n"
        "from ebjdat_serve.server import litserve_adapter\n"
        "from ebjdat_serve.server.settings import Settings\n"
        "class Lossy:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        "class Server:\n"
        "    stopping, failed, greeting = False, '', ''\n"
        "    def run(self, **_):\n"
        "        Lossy()\n"
        "        print('lost', flush=True)\n"
        "        time.sleep(30)\n"
        "litserve_adapter.run(Server(), Settings(), '')\n"
        "print('stopped')\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=25)
    assert done.stdout.split() == ["lost", "stopped"]
    assert time.monotonic() - began < 20
