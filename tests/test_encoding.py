"""Tests that text is UTF-8 in every locale, and that printing never ends a command."""

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ebjdat_serve.bundle import Bundle, write_rows
from tests.conftest import ROOT

FOLDERS = ("ebjdat_serve", "training", "export", "clients", "benchmarks")


def in_the_locales_encoding(tree: ast.AST) -> Iterator[ast.Call]:
    """Yield the calls that open, read, write or pipe text without saying how it is encoded; ruff's PLW1514 knows but some of them."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if "encoding" in named:
            continue
        attribute = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        if attribute in ("read_text", "write_text") or "text" in named or "universal_newlines" in named:
            yield call
        elif name == "open" or attribute in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
            path_first = name == "open" or attribute == "fdopen"  # the others take the mode first
            place = call.args[1:2] if path_first else call.args[:1]
            mode = named.get("mode") or (place[0] if place else None)
            if mode is None:
                text = path_first or (attribute == "open" and not call.args and not call.keywords and not a_class(call.func))
            else:
                text = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) <= set("rwaxt+")
            if text:
                yield call


def a_class(function: ast.expr) -> bool:
    owner = function.value if isinstance(function, ast.Attribute) else function
    return (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", ""))[:1].isupper()


def test_every_text_says_how_it_is_encoded():
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py") if "node_modules" not in file.parts]
    assert len(files) > 100
    found = [f"{file.relative_to(ROOT)}:{call.lineno}" for file in files for call in in_the_locales_encoding(ast.parse(file.read_bytes()))]
    assert not found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("path.read_text()", 1),
        ("path.write_text(x)", 1),
        ("open(x)", 1),
        ("open(x, 'w')", 1),
        ("path.open()", 1),
        ("path.open('a')", 1),
        ("os.fdopen(3, 'w')", 1),
        ("subprocess.run(x, text=True)", 1),
        ("tempfile.NamedTemporaryFile('w')", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("open(x, 'rb')", 0),
        ("path.open('wb')", 0),
        ("Image.open(x)", 0),
        ("Wire.open()", 0),
        ("subprocess.run(x, encoding='utf-8')", 0),
        ("tempfile.NamedTemporaryFile(dir=x)", 0),
    ],
)
def test_the_check_finds_what_it_is_for(code, found):
    assert len(list(in_the_locales_encoding(ast.parse(code)))) == found


# what is printed -----------------------------------------------------------------------------------------------------------

LOCALES = {
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin-1": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"},
}
COMMANDS = sorted(
    file for folder in ("training", "export") for file in (ROOT / folder).glob("*.py") if "\ndef main()" in file.read_text("utf-8")
)


def run(locale: str, *words: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={**environment, "PYTHONPATH": str(ROOT), **LOCALES[locale], **more},
        capture_output=True,
        encoding="latin-1",
        check=False,
    )


@pytest.fixture
def named(shipped, tmp_path) -> Bundle:
    """A bundle whose name and labels no ASCII holds."""
    shutil.copytree(shipped.path, tmp_path / "Bündel")
    bundle = Bundle.draft(tmp_path / "Bündel")
    labels = ["Käfer", "Ωμέγα", "猫", *bundle.manifest.labels[3:]]
    first, *others = bundle.metrics()
    write_rows(bundle.path / "metrics.json", [replace(first, dataset="Käfer → 猫 ± 1"), *others])
    return bundle.update("metrics.json", labels=labels)


@pytest.mark.parametrize("locale", LOCALES)
def test_a_bundle_is_shown_in_any_locale(named, locale):
    done = run(locale, "-m", "ebjdat_serve.cli", "inspect", named.path)
    assert done.returncode == 0, done.stderr
    assert r"\u732b" in done.stdout  # what the terminal lacks is escaped
    refused = run(locale, "-m", "ebjdat_serve.cli", "inspect", named.path / "猫")
    assert refused.returncode == 2
    assert "neither a bundle" in refused.stderr


@pytest.mark.parametrize("locale", LOCALES)
def test_a_model_runs_from_a_folder_of_any_name_in_any_locale(named, locale):
    done = run(locale, "-m", "ebjdat_serve.cli", "verify", named.path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("ok\n")
    assert not any(module in done.stderr for module in ("Traceback", "UnicodeEncodeError"))


def test_a_folder_that_onnx_runtime_cannot_open_is_said(shipped, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(shipped.path, folder)
    done = run("C", "-m", "ebjdat_serve.cli", "verify", folder)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert r"caf\xe9" in done.stderr
    assert "paths in UTF-8" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("locale", LOCALES)
def test_a_card_is_utf_8_in_any_locale(named, locale):
    done = run(locale, ROOT / "training" / "card.py", named.path)
    assert done.returncode == 0, done.stderr
    text = (named.path / "README.md").read_bytes().decode("utf-8")
    assert "Käfer → 猫 ± 1" in text
    assert Bundle.load(named.path).manifest.labels[2] == "猫"


HELP = """
import runpy, sys

for command in sys.argv[1:]:
    print("#", command)
    sys.argv = [command, "--help"]
    try:
        runpy.run_path(command, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (command, ended.code)
"""


@pytest.mark.slow
def test_the_help_of_every_command_is_shown_in_any_locale():
    """In one process, which imports torch once."""
    done = run("C", "-c", HELP, *COMMANDS)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split("# ")[1:]
    assert len(shown) == len(COMMANDS) > 5
    for command, said in zip(COMMANDS, shown, strict=True):
        assert said.startswith(f"{command}\nusage: {command.name}"), said
