"""Tests of settings: options, variables, validation, help and docs from one declaration."""

import argparse
import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_origin

import pytest

from ebjdat_serve.contract import Input
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.read.images import limits
from ebjdat_serve.server.settings import SETTINGS, Settings, add_arguments, settings_of, table
from tests.conftest import ROOT

BY_NAME = {one.name: one for one in SETTINGS}


def read(*arguments, **environment):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_of(parser.parse_args(arguments), environment)


def sample(one, step=1):
    """Return a value that is not the default, as text and as it is read; another for another ``step``."""
    if one.choices:
        text = [choice for choice in one.choices if choice != one.default][step % (len(one.choices) - 1)]
        return text, text
    if one.type is bool:
        return ("1", True) if step == 1 else ("0", False)
    if one.type is Path:
        return f"/models/{step}", Path(f"/models/{step}")
    if get_origin(one.type) is tuple:
        return f"{step}.pub.pem", (get_args(one.type)[0](f"{step}.pub.pem"),)
    value = one.type(one.default * (1 + step) if one.default else step / 4 if one.about.below == 1 else step)
    return str(value), value


def flagged(one, text):
    """Return the words of a command line that set ``one``."""
    if one.type is bool:
        return [one.flag if text == "1" else f"--no-{one.flag[2:]}"]
    return [text] if one.flag == "MODEL" else [one.flag, text]


@pytest.mark.parametrize("one", SETTINGS, ids=lambda one: one.name)
def test_an_option_wins_over_its_variable_and_a_variable_over_the_default(one):
    assert getattr(read(), one.name) == one.default
    text, value = sample(one)
    assert getattr(read(**{one.variable: text}), one.name) == value
    assert getattr(read(**{one.variable: ""}), one.name) == one.default
    other, said = sample(one, 2)
    assert getattr(read(*flagged(one, other), **{one.variable: text}), one.name) == said
    assert getattr(read(*flagged(one, other), **{one.variable: "nonsense"}), one.name) == said  # a variable that does not count


def test_every_field_is_a_setting_with_help():
    assert [one.name for one in SETTINGS] == [field.name for field in fields(Settings)]
    assert all(one.about.help and one.about.group for one in SETTINGS)
    assert all(one.about.bounds for one in SETTINGS if one.type in (int, float))


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("EBJDAT_PORT", "80", "EBJDAT_PORT must be 1024 to 65535, not 80"),
        ("EBJDAT_PORT", "http", "EBJDAT_PORT must be an integer, not 'http'"),
        ("EBJDAT_ALPHA", "1", "EBJDAT_ALPHA must be above 0 and below 1, not 1.0"),
        ("EBJDAT_ALPHA", "nan", "EBJDAT_ALPHA must be above 0 and below 1, not nan"),
        ("EBJDAT_KEEP_ALIVE", "inf", "EBJDAT_KEEP_ALIVE must be seconds above 0, not inf"),
        ("EBJDAT_KEEP_ALIVE", "5 s", "EBJDAT_KEEP_ALIVE must be a number, not '5 s'"),
        ("EBJDAT_DEVICE", "gpu", "EBJDAT_DEVICE must be one of auto, cpu, cuda, tensorrt, not 'gpu'"),
        ("EBJDAT_STOCK", "maybe", "EBJDAT_STOCK must be one of 1, true, yes, 0, false, no, not 'maybe'"),
        ("EBJDAT_CLASSIFY_WORKERS", "0", "EBJDAT_CLASSIFY_WORKERS must be at least 1, not 0"),
    ],
)
def test_a_bad_variable_is_named_with_what_it_may_be(variable, text, said):
    with pytest.raises(EbjdatError) as refused:
        read(**{variable: text})
    assert str(refused.value) == said


def test_a_bad_variable_ends_the_command_with_its_name(tmp_path):
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "EBJDAT_MAX_BATCH": "none", "EBJDAT_NOBODY_KNOWS": "1"}
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "ebjdat-serve: EBJDAT_MAX_BATCH must be an integer, not 'none'\n"


def test_code_that_sets_a_value_out_of_bounds_is_told_the_option():
    with pytest.raises(EbjdatError, match="--max-batch must be at least 1, not 0"):
        Settings(max_batch=0)
    with pytest.raises(EbjdatError, match="--engine must be one of auto, onnx, torch, not 'tensorflow'"):
        Settings(engine="tensorflow")


def test_no_variable_of_a_setting_means_something_else_elsewhere():
    """Folders have variables of their own: EBJDAT_DATA, EBJDAT_RUNS, EBJDAT_CACHE."""
    ours = {one.variable for one in SETTINGS}
    files = [file for folder in ("ebjdat_serve", "training", "export", "clients") for file in (ROOT / folder).rglob("*.py")]
    elsewhere = {name for file in files for name in re.findall(r"""["'](EBJDAT_[A-Z_]+)["']""", file.read_text(encoding="utf-8"))}
    assert {"EBJDAT_DATA", "EBJDAT_RUNS", "EBJDAT_CACHE"} <= elsewhere
    assert not ours & elsewhere


def test_every_setting_is_read_somewhere():
    files = [file for file in (ROOT / "ebjdat_serve").rglob("*.py") if file.name != "settings.py"]
    trees = [ast.parse(file.read_bytes()) for file in files]
    read_names = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert set(BY_NAME) <= read_names


def test_what_decoders_share_does_not_depend_on_how_many_there_are():
    """With a memory of all that was the same for all, nine decoders left one image 64 MiB."""
    assert {limits(Settings(decoders=n)).max_memory for n in (1, 2, 9, 100)} == {448 * 2**20}
    assert limits(Settings(decoders=2, decode_memory=2**29)).max_memory == 448 * 2**20
    assert limits(Settings(decoders=3, decode_memory=2**29)).max_memory == 384 * 2**20


@pytest.mark.parametrize(
    ("side", "models", "given", "threads"),
    [(32, 1, None, 4), (64, 1, None, 4), (65, 1, None, 8), (224, 1, None, 8), (224, 3, None, 2), (32, 9, None, 1), (224, 3, 5, 5)],
)
def test_a_large_network_has_all_cpus_a_small_one_half_and_models_share_them(monkeypatch, side, models, given, threads):
    monkeypatch.setattr("ebjdat_serve.verification.cpus", lambda: 8)
    terms = Settings(threads=given, more=(Path("another"),) * (models - 1)).terms()
    assert terms.threads_for(Input(side, side)) == threads


def test_help_is_in_groups_and_shows_unit_and_default():
    command = [sys.executable, "-m", "ebjdat_serve.cli", "serve", "--help"]
    environment = {"PATH": "/usr/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    assert text.startswith("usage: ebjdat-serve serve [OPTIONS] [MODEL [[NAME=]MODEL ...]]\n")
    for group in dict.fromkeys(one.about.group for one in SETTINGS):
        assert f"\n{group}:\n" in text
    for one in SETTINGS:
        here = f": {one.default}" if one.name == "decoders" else ""  # on this machine
        assert f"{one.about.help} ({one.default_text}{here})" in text
    assert "--worker-timeout SECONDS" in text
    assert "==SUPPRESS==" not in text


def test_the_documentation_has_every_setting():
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    assert table() in text, "run python benchmarks/tables.py"
