"""Tests of a read-only or missing home: whatever needs a folder names its environment variable, the rest works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.folders import ensure_folder, folder
from tests.conftest import ROOT

NO_HOME = "/dev/null/home"
"""A folder that nobody, root included, can make."""


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EBJDAT_")}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**kept, "HOME": NO_HOME, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def test_a_folder_is_the_variables_or_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path))
    assert folder("EBJDAT_RUNS", "runs") == tmp_path
    monkeypatch.setenv("EBJDAT_RUNS", "")  # set and empty is not set
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder("EBJDAT_RUNS", "runs") == tmp_path / ".cache" / "ebjdat_serve" / "runs"
    assert ensure_folder(tmp_path / "a" / "b", "EBJDAT_RUNS").is_dir()
    with pytest.raises(EbjdatError, match="set EBJDAT_RUNS to a folder that can"):
        ensure_folder(Path(NO_HOME), "EBJDAT_RUNS")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user id without an entry in passwd
    with pytest.raises(EbjdatError, match=r"no home folder .* set EBJDAT_RUNS"):
        folder("EBJDAT_RUNS", "runs")


def test_a_model_is_checked_without_a_home():
    done = run("-m", "ebjdat_serve.cli", "verify")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")


@pytest.mark.slow
def test_training_without_a_home_names_the_variable_and_works_with_it(tmp_path):
    refused = run(ROOT / "training" / "train.py", "digits", "--max-minutes", "0")
    assert refused.returncode == 1
    assert "cannot be written (Not a directory): set EBJDAT_RUNS to a folder that can" in refused.stderr
    assert "Traceback" not in refused.stderr
    words = ("standard", "--data", "digits", "--set", "epochs=1", "--only-train", "--run", "one")
    done = run(ROOT / "training" / "train.py", *words, EBJDAT_RUNS=str(tmp_path))
    assert done.returncode == 0, done.stderr
    absent = run(ROOT / "training" / "train.py", "standard", EBJDAT_RUNS=str(tmp_path))
    assert "set EBJDAT_DATA to a folder" in absent.stderr
    assert "Traceback" not in absent.stderr


@pytest.mark.slow
def test_evaluation_without_a_home_names_the_variable(tmp_path):
    weights = ROOT / "benchmarks" / "models" / "standard" / "weights.safetensors"
    done = run(
        ROOT / "training" / "evaluate.py", weights, "--part", "clean", "--n", "20", EBJDAT_DATA=os.environ.get("EBJDAT_DATA", str(tmp_path))
    )
    assert done.returncode == 1
    assert re.search("set EBJDAT_(RUNS|DATA) to a folder", done.stderr)
    assert "Traceback" not in done.stderr
