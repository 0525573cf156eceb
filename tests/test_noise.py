"""Tests of log output: one line per stage for people, JSON for machines (`--log json`), no messages of libraries."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import httpx2
import pytest
from safetensors.numpy import load_file, save_file

from ebjdat_serve import logs
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import ROOT, descendants, free_port
from training.data.datasets import load
from training.evaluate import evaluate_module
from training.evaluation.context import SUITES
from training.loop.state import save_weights
from training.presets import DIGITS

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(*words, cwd, **environment):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=300)


def objects(text):
    """Every line as JSON: a line that is none is an error."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_an_export_says_nothing_of_its_own(tmp_path):
    """In a process of its own: torch's log goes to what standard error was when torch was imported."""
    bundle = tmp_path / "bundle"
    shutil.copytree(SHIPPED, bundle)
    script = (
        "import numpy as np, pathlib, sys\n"
        "from ebjdat_serve.bundle import Bundle\n"
        "from ebjdat_serve.exporting.int8 import write_int8\n"
        "from export.to_onnx import write\n"
        "bundle = Bundle.draft(pathlib.Path(sys.argv[1]))\n"
        "write(bundle, 'classify', 'fp32')\n"
        "write_int8(bundle, np.random.default_rng(0).random((32, 3, 32, 32), dtype=np.float32))\n"
    )
    done = python("-c", script, bundle, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Weights to start from, so that no warm start is trained."""
    file = tmp_path_factory.mktemp("noise") / "weights.safetensors"
    save_weights(DIGITS.architecture.build(10).state_dict(), file)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("style", ["text", "json"])
def test_training_is_a_line_for_people_and_all_figures_for_machines(tmp_path, start, style):
    words = (ROOT / "training" / "train.py", "digits", "--only-train", "--init", start, "--run", "noise", "--threads", "1")
    more = ("--set", "epochs=1", "--log", style)
    done = python(*words, *more, cwd=tmp_path, EBJDAT_RUNS=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    if style == "text":
        began, reached, ended = done.stdout.splitlines()
        assert "train digits in" in began
        assert "17 of 17 steps" in reached
        assert "PGD-10" in reached
        assert ended.startswith("trained ")
    else:
        rows = objects(done.stdout)
        assert all({"time", "level", "logger", "message"} <= row.keys() for row in rows)
        assert any("selection_pgd10" in row for row in rows)
        assert any("loss" in row for row in rows)
        assert rows[-1]["message"].startswith("trained ")
        again = python(*words, "--log", style, cwd=tmp_path, EBJDAT_RUNS=str(tmp_path))
        assert (again.returncode, again.stderr) == (1, "")
        (row,) = objects(again.stdout)
        assert row["level"] == "error"
        assert "--resume" in row["message"]


def test_an_evaluation_is_a_line_a_part_and_every_figure_on_request(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    model, suite = DIGITS.architecture.build(10).eval(), replace(SUITES["quick"], test=20)
    with caplog.at_level(logging.DEBUG, logger="training"):
        rows = evaluate_module(model, load("digits"), suite=suite, parts=("clean",), name="noise")
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert len(told) == 1
    assert told[0].startswith(f"measured clean of noise on digits: {len(rows)} figures, ")
    assert [record.fields["metric"] for record in caplog.records if hasattr(record, "fields")] == [row.metric for row in rows]


@pytest.fixture(scope="module")
def mismatched(tmp_path_factory):
    """A bundle whose self-test is not that of its graphs: what is found only when a worker has opened it."""
    from ebjdat_serve.bundle import write_json

    home = tmp_path_factory.mktemp("noise") / "mismatched"
    shutil.copytree(SHIPPED, home)
    answers = load_file(home / "selftest.safetensors")
    save_file({**answers, "logits": answers["logits"] + 1}, home / "selftest.safetensors")
    bundle = Bundle.draft(home).update("selftest.safetensors")
    write_json(home / "bundle.json", asdict(bundle.manifest))
    return home


@pytest.mark.parametrize("style", ["text", pytest.param("json", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_failed_start_is_one_line_with_the_reason(mismatched, tmp_path, style):
    words = ("-m", "ebjdat_serve.cli", "serve", mismatched, "--port", free_port(), "--device", "cpu", "--threads", "1", "--log", style)
    done = python(*words, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    if style == "text":
        assert done.stdout.splitlines() == [f"starting {mismatched}"]
        (said,) = done.stderr.splitlines()
    else:
        assert done.stderr == ""
        _, row = objects(done.stdout)
        assert row["level"] == "error"
        said = row["message"]
    assert "self-test failed" in said


@pytest.mark.slow
@pytest.mark.parametrize("style", ["text", "json"])
def test_a_server_says_where_it_is_what_went_wrong_and_nothing_else(tmp_path, style):
    port = free_port()
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", "--port", str(port), "--device", "cpu", "--threads", "1", "--log", style]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    try:
        lines = [process.stdout.readline() for _ in range(2)]
        url = f"http://127.0.0.1:{port}"
        worker = next(pid for pid in descendants(process.pid) if b"spawn_main" in cmdline(pid))
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 60
        while httpx2.get(f"{url}/health").status_code == 200 and time.monotonic() < end:
            time.sleep(0.05)
        while httpx2.get(f"{url}/health").status_code != 200 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    out = "".join(lines) + out
    if style == "text":
        assert [url in line for line in out.splitlines()] == [False, True]
        (said,) = err.splitlines()
        assert said.startswith("WARNING: ")
    else:
        assert err == ""
        rows = objects(out)
        assert rows[1]["url"] == url
        (said,) = [row["message"] for row in rows if row["level"] == "warning"]
        assert {row["level"] for row in rows} <= {"info", "warning"}
    assert "died; another is starting" in said


def cmdline(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()


def test_json_lines_hold_the_traceback_and_the_fields():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("training", logging.ERROR, "", 0, "it %s", ("broke",), sys.exc_info())
    record.fields = {"step": 3}
    (row,) = objects(logs.JsonLines().format(record))
    assert (row["level"], row["message"], row["step"]) == ("error", "it broke", 3)
    assert "ValueError: two" in row["traceback"]


def test_stock_mode_has_no_json(tmp_path):
    done = python("-m", "ebjdat_serve.cli", "serve", "--stock", "--log", "json", "--port", free_port(), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "leave out --log json" in done.stdout
