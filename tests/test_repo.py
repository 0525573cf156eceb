"""Tests of the repository: names, the README's claims and commands, the preset list."""

import ast
import json
import re
import shlex
import subprocess
import sys
import threading
import time
import tomllib
from contextlib import nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import packages_distributions
from types import SimpleNamespace

import pytest

import ebjdat_serve
from benchmarks.equal_budget_entries import ENTRIES
from benchmarks.methods import SEEDS, table
from tests import conftest
from tests.conftest import ROOT
from training.config import describe, stages
from training.overrides import MEASURED, override
from training.presets import METHODS, PRESETS, preset


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listing] or [p for p in ROOT.rglob("*") if ".venv" not in p.parts and p.is_file()]


def test_no_script_shadows_a_package():
    known = set(sys.stdlib_module_names) | set(packages_distributions())
    for folder in ("training", "export", "clients", "benchmarks"):
        for file in (ROOT / folder).glob("*.py"):
            if file.stem != "__init__":
                assert file.stem not in known, f"{file.name} run as a script would shadow the package {file.stem}"


def test_functions_and_files_stay_readable():
    for file in tracked():
        if file.suffix == ".py" and "tests" not in file.parts:
            assert len(file.read_text().splitlines()) <= 350, file


def test_the_linters_the_makefile_and_the_readme_know_the_oldest_python():
    """A newer Python's syntax or library is then a failure of make check, whichever Python runs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()
    assert f"Python {oldest} or newer" in (ROOT / "README.md").read_text()


def test_readme_commands_exist():
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for block in re.findall(r"```bash\n(.*?)```", readme, re.S):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", makefile, re.M), line
            for word in words:
                if word.endswith((".py", ".sh")) and "/" in word:
                    assert (ROOT / word).is_file(), line


TEXTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def faults_of_curl(line: str) -> list[str]:
    """Return a curl command that sends the picture in a wrong way: -T would PUT it, and curl takes no address without a host."""
    sends = re.search(r"--data-binary @cat\.png|-F image=@cat\.png|base64 .*cat\.png", line)
    return [] if sends and re.search(r"http://[a-z0-9.]+:\d+/", line) else [line]


def test_every_curl_that_sends_the_picture_posts_it_to_a_host():
    assert faults_of_curl("curl -T cat.png http://localhost:8000/classify")
    assert faults_of_curl("curl --data-binary @cat.png :8000/classify")
    joined = [text.read_text(encoding="utf-8").replace("\\\n", "") for text in TEXTS]
    lines = [line.strip() for text in joined for line in text.splitlines() if re.match(r"\s*curl .*cat\.png", line)]
    assert len(lines) >= 5
    assert not [fault for line in lines for fault in faults_of_curl(line)]


def test_what_a_text_calls_of_the_package_is_there_after_its_import():
    """A submodule is not: ``import ebjdat_serve`` imports none."""
    called = {name for text in TEXTS for name in re.findall(r"\bebjdat_serve\.(\w+)[\w.]*\(", text.read_text(encoding="utf-8"))}
    assert "load" in called
    assert called <= set(ebjdat_serve.__all__)


def test_what_the_readme_installs_into_the_venv_leaves_the_checkout_in_it():
    """Without -e pip replaces the checkout by a copy, in which training/ and export/ are missing."""
    installs = re.findall(r"\.venv/bin/pip install (.*?)'\.\[", "".join(text.read_text(encoding="utf-8") for text in TEXTS))
    assert installs
    assert set(installs) == {"-e "}


def test_a_second_make_does_not_install_again():
    import pytest

    if not list((ROOT / ".venv").glob(".stamp-dev-*")):
        pytest.skip("this is not the environment that make made")
    plan = subprocess.run(["make", "-n", "setup"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pip install" not in plan


def test_every_decision_is_numbered_once():
    numbers = [file.name[:4] for file in sorted((ROOT / "docs" / "decisions").glob("*.md"))]
    assert numbers == [f"{i + 1:04}" for i in range(len(numbers))]


@pytest.mark.parametrize(("i", "row"), [(1, "warm"), (2, "trades-w1"), (3, "ebjdat-light")])
def test_the_shipped_recipe_is_what_was_trained_at_equal_budget(i, row):
    kept = json.loads((ROOT / "benchmarks" / "models" / f"wrn28-{row}" / "config.json").read_text(encoding="utf-8"))["stages"][-1]
    here = json.loads(json.dumps(describe(stages(PRESETS["cifar10-small"])[i])))
    assert {name: value for name, value in here.items() if kept.get(name) != value}.keys() <= {
        "name",
        "warm_start",
        "sample",
        "averaged_with",
    }


def test_the_shipped_recipe_begins_as_the_runs_at_equal_budget_did():
    """No weights of the FGSM-RS run were kept: the preset is compared with its entry."""
    entry = ENTRIES["warm-fgsm"]
    ran = override(preset(entry.method, "small", "cifar10"), ["depth=28", "width=2", f"epochs={entry.epochs}", *entry.settings])
    here = describe(stages(PRESETS["cifar10-small"])[0])
    assert {name for name, value in describe(ran).items() if here[name] != value} == {"name", "sample"}


@pytest.mark.parametrize("name", ["cifar10", "cifar10-full"])
def test_recipes_for_a_gpu_are_the_shipped_one_on_wider_networks(name):
    for here, small in zip(stages(PRESETS[name]), stages(PRESETS["cifar10-small"]), strict=True):
        assert here.architecture != small.architecture
        same = {
            "name": small.name,
            "architecture": small.architecture,
            "warm_start": small.warm_start,
            "averaged_with": small.averaged_with,
        }
        assert replace(here, **same) == small


def test_warm_starts_exist_and_share_the_network():
    for name in METHODS:
        *warm, joint = stages(preset(name, "small", "cifar100"))
        for start in warm:
            assert (start.architecture, start.dataset) == (joint.architecture, "cifar100")
            assert start.warm_start is None


def test_the_comparison_of_methods_is_what_was_measured_of_the_presets_as_they_are():
    """A method need not have been measured: its row says so."""
    measured = json.loads(MEASURED.read_text())
    assert list(measured) and set(measured) <= set(METHODS)
    for name, held in measured.items():
        assert [row["seed"] for row in held["rows"]] == list(SEEDS)
        for row in held["rows"]:
            now = describe(override(preset(name, "digits"), [f"seed={row['seed']}"]))
            assert row["configuration"] == json.loads(json.dumps(now)), f"{name}: python benchmarks/methods.py measures it again"
            assert "failed" in row or (row["n"] == 300 and len(row["of"]) == 64)
    written = (ROOT / "docs" / "methods.md").read_text()
    assert table(measured) in written, "python benchmarks/methods.py --only, without a name, trains nothing and writes the table"


def test_no_clock_that_can_jump_is_read_while_serving():
    """Deadlines, rates and waits are of monotonic clocks: a clock that is set harms nobody."""
    for file in [*(ROOT / "ebjdat_serve" / "server").rglob("*.py"), ROOT / "ebjdat_serve" / "scheduling.py"]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {("time", "time"), ("datetime", "now"), ("datetime", "utcnow")}, file
            if isinstance(node, ast.ImportFrom):
                assert node.module != "datetime" and not (node.module == "time" and node.names[0].name == "time"), file


def test_the_images_health_check_goes_through_no_proxy(monkeypatch):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    command = re.search(r"^    CMD (\[.*\])$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
    _, *words = json.loads(command[1])
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for proxy in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(proxy, "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("EBJDAT_PORT", str(server.server_port))
        done = subprocess.run([sys.executable, *words], capture_output=True, encoding="utf-8", check=False)
        server.shutdown()
    assert done.returncode == 0, done.stderr


def test_the_readmes_tree_is_the_tree():
    """Every room has its line, in place, and every line is a room."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```\n(ebjdat_serve/.*?)^```$", readme, re.S | re.M)
    listed, above = [], []
    for line in block.splitlines():
        indent, name = re.match(r"( *)([\w/]+)/ +\S", line).groups()
        above = [*above[: len(indent) // 2], name]
        listed.append("/".join(above))
    there = {file.relative_to(ROOT).parent for file in tracked() if file.is_file()}
    folders = {str(parent) for folder in there for parent in (folder, *folder.parents)} - {".", ".ci"}
    rooms = {name for name in folders if "/" not in name or name.startswith(("ebjdat_serve/", "training/"))} - {
        "ebjdat_serve/models/cifar10"
    }
    assert sorted(listed) == sorted(rooms)
    assert listed.index("ebjdat_serve") == 0  # the wheel first, then the laboratory
    assert len(listed) == len(set(listed))


def test_every_promise_of_security_md_names_tests_that_exist():
    table = (ROOT / "docs" / "security.md").read_text(encoding="utf-8").split("## Promises")[1].split("##")[0]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    there = set(
        re.findall(r"^def (test_\w+)", "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")), re.M)
    )
    assert len(rows) > 15
    for promise, tests in rows:
        names = re.findall(r"`(test_\w+)`", tests)
        assert names, promise
        assert set(names) <= there, set(names) - there


@pytest.mark.parametrize(
    ("mark", "until", "skipped"), [("slow", -1, True), ("slow", 60, False), ("network", -1, False), ("slow", None, False)]
)
def test_a_run_whose_time_is_over_begins_no_slow_test(monkeypatch, mark, until, skipped):
    monkeypatch.delenv(conftest.SLOW_UNTIL, raising=False)
    if until is not None:
        monkeypatch.setenv(conftest.SLOW_UNTIL, str(time.time() + until))
    item = SimpleNamespace(get_closest_marker=lambda name: name == mark)
    with pytest.raises(pytest.skip.Exception, match="make test-slow") if skipped else nullcontext():
        conftest.pytest_runtest_setup(item)
