"""Contracts with LitServe's private names: if an upgrade moves one, this says which."""

import inspect
import subprocess
import sys
import time

import litserve as ls
from litserve import server as litserver
from litserve.loops import LitLoop
from litserve.loops.loops import inference_worker


def test_the_loop_is_called_with_the_api_first_and_ends_the_worker():
    source = inspect.getsource(inference_worker)
    assert "lit_api.setup(device)" in source
    assert "loop: LitLoop = lit_api.loop" in source
    assert source.rstrip().endswith("callback_runner,\n    )")  # what the loop returns to is the end of the process
    assert list(inspect.signature(LitLoop.__call__).parameters)[1] == "lit_api"


def test_the_server_calls_what_we_override_and_keeps_what_we_read():
    made = inspect.getsource(ls.LitServer.__init__)
    assert "self.register_endpoints()" in made
    assert made.index("self.register_endpoints()") < made.index("register middleware")  # so ours may empty self.middlewares
    assert "self.middlewares = middlewares" in made
    assert "lifespan=self.lifespan" in made
    assert "self.monitor_internal = " in made
    assert "self.uvicorn_graceful_timeout = " in made
    run = inspect.getsource(ls.LitServer.run)
    assert "manager = self._init_manager(num_api_servers)" in run
    assert "self.verify_worker_status()" in run
    assert "self._start_server(" in run
    assert "self._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)" in run
    assert "self._shutdown_event.wait()" in run
    assert "except KeyboardInterrupt" in run
    assert "return dict(enumerate(workers))" in inspect.getsource(ls.LitServer._start_server)


def test_the_monitor_starts_a_dead_worker_again_by_the_name_we_override():
    source = inspect.getsource(ls.LitServer._start_worker_monitoring)
    assert "self.launch_single_inference_worker(lit_api, worker_id)" in source
    assert "while not self._shutdown_event.is_set()" in source
    assert "time.sleep(self.monitor_internal)" in source


def test_what_our_flags_stand_in_for_is_all_there_is():
    """What LitServe keeps in its manager, and what it asks of it."""
    kept = inspect.getsource(ls.LitServer._init_manager)
    for name in ("self.workers_setup_status", "self._shutdown_event", "self.litapi_request_queues", "self._transport"):
        assert name in kept
    stop = inspect.getsource(ls.LitServer._perform_graceful_shutdown)
    assert "manager.shutdown()" in stop
    assert "self._transport.close(send_sentinel=" in stop
    assert "await transport.areceive(consumer_id)" in inspect.getsource(litserver.response_queue_to_buffer)
    assert "if workers_setup_status:" in inspect.getsource(inference_worker)


def test_a_stop_that_python_drops_is_given_again(tmp_path):
    """A signal whose exception is raised inside a destructor is lost; two seconds later it comes again."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, pathlib, signal, sys, time\n"
        "from ebjdat_serve.server import seam\n"
        "class Lossy:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.2)\n"
        "class Server:\n"
        "    stopping, failed, greeting, folder = False, '', '', pathlib.Path(sys.argv[1])\n"
        "    def run(self, **_):\n"
        "        Lossy()\n"
        "        print('lost', flush=True)\n"
        "        time.sleep(30)\n"
        "seam.run(Server(), '127.0.0.1', 1, '')\n"
        "print('stopped')\n"
    )
    (tmp_path / "private").mkdir()
    began = time.monotonic()
    command = [sys.executable, str(script), str(tmp_path / "private")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=25)
    assert done.stdout.split() == ["lost", "stopped"]
    assert time.monotonic() - began < 20
    assert not (tmp_path / "private").exists()
