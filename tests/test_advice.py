"""Tests that errors give valid advice: each option belongs to the command that prints it, each command and extra exists."""

import argparse
import ast
import importlib
import re
import shlex
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ebjdat_serve import cli, console, install
from ebjdat_serve.errors import BundleError, EbjdatError, EngineError
from ebjdat_serve.server import litserve_adapter
from ebjdat_serve.server.settings import SETTINGS
from tests.conftest import ROOT
from training.errors import DataError

NAMES = [file.relative_to(ROOT) for folder in ("training", "export") for file in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [name for name in NAMES if "\ndef main()" in (ROOT / name).read_text(encoding="utf-8")]
HOST = {
    "training/overrides.py": "training/train.py",
    "training/refresh.py": "training/train.py",
    "training/evaluation/context.py": "training/evaluate.py",
    "training/evaluation/evaluated_model.py": "training/evaluate.py",
    "ebjdat_serve/server/read/browsers.py": "ebjdat-serve serve",
    "ebjdat_serve/import_command.py": "ebjdat-serve import",
    "ebjdat_serve/importing/__init__.py": "ebjdat-serve import",
    "ebjdat_serve/importing/onnx_source.py": "ebjdat-serve import",
    "ebjdat_serve/audit_rows.py": "ebjdat-serve calibrate",
    "ebjdat_serve/calibrate_command.py": "ebjdat-serve calibrate",
    "ebjdat_serve/score_calibration.py": "ebjdat-serve calibrate",
    "ebjdat_serve/folder_calibration.py": "ebjdat-serve calibrate",
    "ebjdat_serve/folder_images.py": "ebjdat-serve calibrate",
    "ebjdat_serve/folder_prior.py": "ebjdat-serve prior",
}
"""Modules that are no commands and whose errors one command alone ends with."""


class Read(Exception):
    """A parser was about to read its command line."""


@pytest.fixture(scope="module")
def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's own parser, by the words it is started with, as its main() builds it."""
    found: dict[str, argparse.ArgumentParser] = {}

    def stop(parser, *_):
        raise Read(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        for name in COMMANDS:
            main = importlib.import_module(".".join(name.with_suffix("").parts)).main
            with pytest.raises(Read) as read:
                main()
            found[str(name)] = read.value.args[0]
        with pytest.raises(Read) as read:
            cli.main([])
    return {**found, **dict(leaves("ebjdat-serve", read.value.args[0]))}


def leaves(words: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield each command below ``parser`` that has no commands of its own, by its words."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield words, parser
    for name, sub in below[0].choices.items() if below else ():
        yield from leaves(f"{words} {name}", sub)


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


# every text in the code ------------------------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str:
    """Return the constant parts of a string, X for what is put into it; nothing for what is no string."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) if isinstance(part, ast.Constant) else "X" for part in node.values)
    return ""


def texts(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, text, whether it is one of an error's options) of all that is raised, printed, said or put into such a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        if isinstance(node, ast.Call):
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            kind = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if "options" in named:
                for part in ast.walk(named["options"]):
                    if found := text_of(part):
                        yield node.lineno, found, True
            if kind.endswith(("Error", "Problem", "OutOfTime")) or kind in ("say", "note", "print", "exit"):
                for argument in node.args:
                    if found := text_of(argument):
                        yield node.lineno, found, False
        elif isinstance(node, ast.Assign) and (found := text_of(node.value)) and " " in found:
            yield node.lineno, found, False


NAMED = re.compile(
    r"(?:python )?(?P<script>(?:training|export)/\w+\.py)"
    r"|(?:ebjdat-)?(?P<served>serve(?! import)|sign|publish|rollback|verify|calibrate)(?= )"
    r"|(?P<flag>--[a-z][a-z-]*)"
)


def test_every_option_that_a_text_names_is_one_of_the_command_that_it_names(parsers):
    """Outside ``options=``, which console.py shows to nobody whose command has them not, an option follows the command that has it."""
    wrong, seen = [], 0
    everything = set().union(*map(flags, parsers.values()))
    for file in [file for folder in ("ebjdat_serve", "training", "export") for file in sorted((ROOT / folder).rglob("*.py"))]:
        name = str(file.relative_to(ROOT))
        own = parsers.get(HOST.get(name, name)) or (parsers["ebjdat-serve serve"] if name == "ebjdat_serve/cli.py" else None)
        for line, text, optional in texts(ast.parse(file.read_bytes())):
            known = everything if optional else flags(own) if own else set()
            for found in NAMED.finditer(text):
                if found["script"] or found["served"]:
                    known = flags(parsers[found["script"] or f"ebjdat-serve {found['served']}"])
                else:
                    seen += 1
                    if found["flag"] not in known:
                        wrong.append(f"{name}:{line}: {found['flag']} in {text!r}")
    assert not wrong
    assert seen > 40


def test_every_help_names_options_of_its_own_command(parsers):
    for name, parser in parsers.items():
        for action in parser._actions:
            for flag in re.findall(r"--[a-z][a-z-]+", action.help or ""):
                assert flag in flags(parser), f"{name}: {flag} in the help of {action.dest}"


VARIABLE = re.compile(r"EBJDAT_[A-Z_]+[A-Z]")
FOLDERS = {"EBJDAT_DATA", "EBJDAT_RUNS", "EBJDAT_CACHE"}
"""Variables that are no settings of the server: folders.py reads them."""
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "Dockerfile", "Makefile")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
ELSEWHERE = {
    "--build-arg": "docker", "--from-file": "kubectl", "--now": "systemctl",
    "--data-binary": "curl", "--strict": "mypy", "--nproc-per-node": "torchrun", "--prefix": "npm", "--dist": "pytest", "--user": "docker",
}  # fmt: skip
"""Options in documents of programs that are not ours, which the same line names."""


def test_every_variable_that_a_text_names_is_read():
    settings = {one.variable for one in SETTINGS}
    read = {
        text_of(call.args[0])
        for folder in ("ebjdat_serve", "training")
        for file in (ROOT / folder).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(call, ast.Call) and call.args and getattr(call.func, "id", "") in ("folder", "place")
    }
    assert read - {""} == FOLDERS
    sources = [
        file for folder in ("ebjdat_serve", "training", "export", "clients", "benchmarks") for file in sorted((ROOT / folder).rglob("*.py"))
    ]
    for file in [*DOCUMENTS, *sources]:
        for name in VARIABLE.findall(file.read_text(encoding="utf-8")):
            assert name in settings | FOLDERS, f"{file.relative_to(ROOT)}: {name}"


def test_every_option_that_a_document_names_is_one_of_a_command(parsers):
    """In a piece of code that begins with a command of ebjdat-serve, of that one; elsewhere of any."""
    declared = {
        text_of(argument)
        for folder in ("clients", "benchmarks", "tests")
        for file in (ROOT / folder).glob("*.py")
        for call in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("add_argument", "addoption")
        for argument in call.args
    }
    everything = declared.union(*map(flags, parsers.values()))
    served = [name.removeprefix("ebjdat-serve ") for name in parsers if name.startswith("ebjdat-serve ")]
    wrong, seen = [], 0
    for file in [file for file in DOCUMENTS if file.suffix == ".md"]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", line):
                seen += 1
                if flag not in everything and ELSEWHERE.get(flag, "\0") not in line:
                    wrong.append(f"{file.relative_to(ROOT)}:{number}: {flag}")
            for command, rest in re.findall(rf"(?:ebjdat-serve |`)({'|'.join(served)})((?: [^`#]*)?)", line):
                unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) - flags(parsers[f"ebjdat-serve {command}"])
                wrong.extend(f"{file.relative_to(ROOT)}:{number}: {flag} of {command}" for flag in unknown)
    assert not wrong
    assert seen > 100


def test_the_check_finds_what_it_is_for():
    bad = "def f():\n raise DataError(f'{x} and {y} differ: give the size to squash to, --set size=32')\n"
    ((_, text, optional),) = texts(ast.parse(bad))
    assert (NAMED.search(text)["flag"], optional) == ("--set", False)
    ((_, text, optional), _) = texts(ast.parse("raise DataError('differ', options=('--set size=32',))"))
    assert (text, optional) == ("--set size=32", True)


# errors that are raised ------------------------------------------------------------------------------------------------------

TWO = ("--engine torch --device cpu", "--precision fp16")


@pytest.mark.parametrize(
    ("error", "command", "said"),
    [
        (DataError("they differ", options=("--set size=32", "--size 32")), "training/train.py", "they differ; or give --set size=32"),
        (DataError("they differ", options=("--set size=32", "--size 32")), "training/calibrate.py", "they differ"),
        (EngineError("no CUDA", options=("--device cpu",)), "export/to_tensorrt.py", "no CUDA"),
        (EngineError("no CUDA", options=("--device cpu",)), "ebjdat-serve serve", "no CUDA; or give --device cpu"),
        (EngineError("x", options=TWO), "training/precision.py", "x; or give --precision fp16"),
        (EngineError("x", options=TWO), "ebjdat-serve verify", "x; or give --engine torch --device cpu or --precision fp16"),
    ],
)
def test_a_command_advises_its_own_options_alone(parsers, error, command, said):
    assert console.advice(error, parsers[command]) == said


@pytest.mark.parametrize(
    ("kind", "device", "precision"),
    [
        ("torch", "tensorrt", "fp32"),
        ("auto", "tensorrt", "bf16"),
        ("onnx", "tensorrt", "int8"),
        ("torch", "cpu", "int8"),
        ("onnx", "cpu", "bf16"),
        ("onnx", "cuda", "fp32"),
        ("onnx", "tensorrt", "fp32"),
        ("torch", "cuda", "fp32"),
    ],
)
def test_the_options_that_an_engine_advises_are_accepted(parsers, shipped, kind, device, precision):
    from ebjdat_serve.engines import load_engine

    try:
        load_engine(shipped, kind, device, 1, precision)
    except (EngineError, BundleError) as error:
        assert error.options
        for option in error.options:
            parsers["ebjdat-serve serve"].parse_args(option.split())  # SystemExit for a flag or a value that there is not
    else:
        pytest.skip("this machine has it")


@pytest.mark.slow
def test_the_size_that_a_folder_needs_is_advised_by_who_can_take_it(parsers, tmp_path, monkeypatch, capsys):
    import numpy as np
    from PIL import Image

    for name, side in (("ash", 9), ("birch", 12)):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(np.full((side, side, 3), i, np.uint8)).save(tmp_path / "own" / name / f"{i}.png")
    from training import train

    monkeypatch.setenv("EBJDAT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(sys, "argv", ["train.py", "standard", "--data", str(tmp_path / "own")])
    with pytest.raises(SystemExit) as ended:
        train.main()
    (option,) = re.findall(r"; or give (--set size=32)$", str(ended.value))
    monkeypatch.setattr(sys, "argv", ["train.py", "standard", "--data", str(tmp_path / "own"), *option.split(), "--max-minutes", "0"])
    with pytest.raises(SystemExit, match="the time ran out") as ended:  # the advice was taken
        train.main()
    words = shlex.split(str(ended.value).partition("go on with: ")[2])
    # and what this one advises goes on with the same run, though the preset's own stage never began
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit, match="the time ran out"):
        train.main()
    assert len(list((tmp_path / "runs").glob("*/config.json"))) == 1
    monkeypatch.setattr(
        sys, "argv", ["train.py", "trades", "--data", str(tmp_path / "own"), "--run", words[words.index("--run") + 1], "--resume"]
    )
    with pytest.raises(SystemExit, match="is a run of own-standard, not of own-trades"):
        train.main()


@pytest.mark.parametrize("extras", ["cpu", "gpu", "gpu,tensorrt", "train", "evaluate", "watch"])
def test_what_is_to_be_installed_exists_and_is_of_this_checkout(extras, monkeypatch):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder in (ROOT, Path("/")):
        monkeypatch.chdir(folder)
        python, *words, what = shlex.split(install.install(extras))
        assert (python, words) == (sys.executable, ["-m", "pip", "install", "-e"])
        home, _, named = what.removesuffix("]").partition("[")
        assert Path(home).resolve() == ROOT
        assert set(named.split(",")) <= set(known["optional-dependencies"])
    monkeypatch.setattr(install, "CHECKOUT", ROOT / "docs")
    assert shlex.split(install.install(extras))[-1] == f"{known['name']}[{extras}]"


def test_every_extra_and_version_that_a_text_names_exists():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pinned = {name.split("==")[0]: name for extra in known["optional-dependencies"].values() for name in extra if "==" in name}
    seen = 0
    for file in [file for folder in ("ebjdat_serve", "training", "export") for file in sorted((ROOT / folder).rglob("*.py"))]:
        for call in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("install", "pip"):
                words = [text_of(argument) for argument in call.args]
                seen += 1
                if call.func.id == "install":
                    assert set(words[0].split(",")) <= set(known["optional-dependencies"]), (file, words)
                elif words[0] == "install" and file.name != "install.py" and words[1]:  # a name that is computed has no version
                    assert words[1] == pinned[words[1].split("==")[0]], (file, words)
    assert seen > 8


def test_an_error_that_crosses_a_process_keeps_its_options():
    import pickle

    error = pickle.loads(pickle.dumps(EbjdatError("no", options=("--device cpu",))))
    assert error.advised() == "no; or give --device cpu"


def test_a_port_that_is_advised_can_be_listened_on():
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
        one.listen()
        try:
            two.bind(("127.0.0.1", port + 1))
        except OSError:
            pytest.skip("somebody else has the next port, which will do as well")
        two.listen()
        with pytest.raises(EngineError) as told:
            litserve_adapter.check_address("127.0.0.1", port)
        (option,) = told.value.options
        assert int(option.removeprefix("--port ")) not in (port, port + 1)
        litserve_adapter.check_address("127.0.0.1", int(option.removeprefix("--port ")))
