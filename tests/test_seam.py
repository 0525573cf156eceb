"""Contracts with LitServe's private names: if an upgrade moves one, this says which."""

import inspect
import subprocess
import sys
import time

import litserve as ls
from litserve.loops import base
from litserve.loops.simple_loops import BatchedLoop
from litserve.server import RegularRequestHandler
from litserve.utils import LitAPIStatus, ResponseBufferItem, WorkerSetupStatus


def test_the_queue_item_is_queue_id_uid_time_payload():
    source = inspect.getsource(RegularRequestHandler._submit_request)
    assert "put((response_queue_id, uid, time.monotonic(), payload))" in source
    assert "return uid, response_queue_id" in source


def test_the_handler_takes_an_api_and_a_server():
    assert list(inspect.signature(RegularRequestHandler.__init__).parameters) == ["self", "lit_api", "server"]


def test_the_batched_loop_asks_get_batch_requests_for_ready_and_late():
    source = inspect.getsource(BatchedLoop.run_batched_loop)
    assert "batches, timed_out_uids = self.get_batch_requests(" in source
    assert "_StopLoopError" in source
    assert base._SENTINEL_VALUE == (None, None, None, None)
    assert issubclass(base._StopLoopError, Exception)


def test_the_response_item_holds_response_and_status():
    assert next(iter(inspect.signature(ResponseBufferItem).parameters)) == "event"
    assert "response" in ResponseBufferItem.__dataclass_fields__
    assert {"OK", "ERROR"} <= set(LitAPIStatus.__dict__)
    assert {"READY", "ERROR", "STARTING"} <= set(WorkerSetupStatus.__dict__)


def test_the_server_calls_what_we_override_and_keeps_what_we_read():
    assert "self.register_endpoints()" in inspect.getsource(ls.LitServer.__init__)
    run = inspect.getsource(ls.LitServer.run)
    assert "self.verify_worker_status()" in run
    assert "self._start_server(" in run
    assert "self._perform_graceful_shutdown(manager, uvicorn_workers, shutdown_reason)" in run
    assert "self._shutdown_event.wait()" in run
    assert "return dict(enumerate(workers))" in inspect.getsource(ls.LitServer._start_server)
    assert "except KeyboardInterrupt" in run
    assert "self.inference_workers" in run
    single = inspect.getsource(ls.LitServer.launch_single_inference_worker)
    assert 'self.workers_setup_status[f"{endpoint}_{worker_id}"] = WorkerSetupStatus.STARTING' in single
    assert "self.workers_setup_status = manager.dict()" in inspect.getsource(ls.LitServer._init_manager)
    assert "self.response_buffer" in inspect.getsource(ls.LitServer.__init__)


def test_a_stop_that_python_drops_is_given_again(tmp_path):
    """A signal whose exception is raised inside a destructor is lost; two seconds later it comes again."""
    script = tmp_path / "lost.py"
    script.write_text(
        "import os, signal, time\n"
        "from ebjdat_serve.server import seam\n"
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
        "seam.run(Server(), '127.0.0.1', 1, '')\n"
        "print('stopped')\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=25)
    assert done.stdout.split() == ["lost", "stopped"]
    assert time.monotonic() - began < 20
