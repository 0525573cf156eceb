"""The examples of CONTRIBUTING.md: each applies to this tree, touches what it says and passes its test; the list of what is left."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_repo import tracked

EXAMPLES = sorted((ROOT / "docs" / "extending").glob("*.diff"))
KINDS = {"method", "network", "score", "view", "endpoint", "dataset"}
REGISTRY_TESTS = (
    "test_repo", "test_registries", "test_detection", "test_endpoints", "test_settings", "test_advice", "test_methods", "test_rows",
    "test_benchmarks",
)  # fmt: skip
WHERE = "import ebjdat_serve, training, export; print(*(package.__path__[0] for package in (ebjdat_serve, training, export)))"


@pytest.fixture
def tree(tmp_path):
    """A copy of the checkout without its history."""
    for file in tracked():
        if file.is_file():
            place = tmp_path / "tree" / file.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, place)
    return tmp_path / "tree"


def added(diff) -> dict[str, list[str]]:
    """Return the lines that a diff adds, by file."""
    found: dict[str, list[str]] = {}
    for line in diff.read_text(encoding="utf-8").splitlines():
        if line.startswith("+++ b/"):
            lines = found.setdefault(line[6:], [])
        elif line.startswith("+"):
            lines.append(line[1:])
    return found


def of_kind(files, kind):
    """Return the files that are code, tests or docs."""
    kinds = {"tests": lambda name: name.startswith("tests/"), "docs": lambda name: name.startswith("docs/")}
    kinds["code"] = lambda name: name.endswith(".py") and not name.startswith("tests/")
    return [name for name in files if kinds[kind](name)]


def apply(tree, *diffs):
    # a folder outside the repository: git apply would otherwise take paths relative to the repository's top
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    subprocess.run(["git", "apply", *map(str, diffs)], cwd=tree, check=True, env=environment)


def python(tree, *words):
    """Run Python in a copy of the tree, whose packages win over an editable install; return its output."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def run_tests(tree, *files):
    assert python(tree, "-c", WHERE).split() == [str(tree / name) for name in ("ebjdat_serve", "training", "export")]
    said = python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files)
    assert re.search(r"\b\d+ passed", said), said


def test_there_is_an_example_of_each_kind():
    assert {diff.stem for diff in EXAMPLES} == KINDS
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"docs/extending/{kind}.diff" in said


@pytest.mark.parametrize("diff", EXAMPLES, ids=lambda diff: diff.stem)
def test_an_addition_is_one_file_of_code_one_line_a_test_and_a_line_of_docs(diff):
    files = added(diff)
    code, tests, docs = (of_kind(files, kind) for kind in ("code", "tests", "docs"))
    assert sorted(files) == sorted([*code, *tests, *docs])
    new = [name for name in files if not (ROOT / name).exists()]
    registry = [name for name in code if name not in new]
    own = [name for name in code if name in new]
    assert (len(tests), len(docs), len(registry)) == (1, 1, 1), files
    assert tests[0] in new
    assert docs[0] not in new
    if diff.stem in ("score", "view"):  # their file is their registry
        assert own == []
        assert sum(f": {'OodScore' if diff.stem == 'score' else 'View'}(" in line for line in files[registry[0]]) == 1
    else:
        assert len(own) == 1
        assert len(files[registry[0]]) <= 3, files[registry[0]]
    assert len(files[docs[0]]) <= (
        2 if diff.stem == "method" else 1
    )  # a method has a row in the table of losses and one in that of results
    subprocess.run(["git", "apply", "--check", str(diff)], cwd=ROOT, check=True)


@pytest.mark.parametrize("diff", EXAMPLES, ids=lambda diff: diff.stem)
def test_an_example_removes_nothing_but_an_import_that_it_lengthens(diff):
    removed = [line[1:] for line in diff.read_text(encoding="utf-8").splitlines() if re.match(r"-(?!--)", line)]
    assert all(re.match(r"from [\w.]+ import ", line) for line in removed), removed
    assert len(removed) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("diff", EXAMPLES, ids=lambda diff: diff.stem)
def test_an_example_passes_its_own_test(diff, tree):
    apply(tree, diff)
    run_tests(tree, *of_kind(added(diff), "tests"))


@pytest.mark.slow
def test_with_all_examples_the_tests_and_checks_that_look_at_registries_pass(tree):
    apply(tree, *EXAMPLES)
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    run_tests(tree, *(f"tests/{name}.py" for name in REGISTRY_TESTS))
    python(tree, "-m", "ruff", "check", "--no-cache", ".")
    python(tree, "-m", "ruff", "format", "--no-cache", "--check", ".")
    python(
        tree, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command(['--config', 'pyproject.toml', '--no-cache'])"
    )


# what is left of one network, one size and one data set ---------------------------------------------------------------

LEFT = re.compile(
    r"WideResNet|wideresnet|\bWRN\b"  # the network
    r"|\b32, 32\b|\b32 x 32\b|_32x32\b"  # the size
    r"|\b(?:n_)?classes ?==? ?10\b|Linear\(\w+, 10\)|\(N, 10\)|\b(?:ten|10) classes\b"  # the classes
    r'|"cifar10"'  # the data set
)
ROOMS = (
    "ebjdat_serve/networks/",  # the families
    "training/data/archives.py", "training/data/sources.py",  # the data sets
    "training/evaluation/resnet20.py", "training/evaluation/crown.py", "training/evaluation/inception.py",  # others' networks
)  # fmt: skip


def test_the_list_of_what_is_left_to_generalise_is_complete_and_true():
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("### Left of WideResNet")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `([\w/.]+)` \|", said, re.M)
    packages = ("ebjdat_serve/", "training/", "export/", "clients/", "benchmarks/")
    files = {str(file.relative_to(ROOT)): file for file in tracked() if file.suffix == ".py"}
    found = [
        name
        for name, file in files.items()
        if name.startswith(packages) and not name.startswith(ROOMS) and LEFT.search(file.read_text(encoding="utf-8"))
    ]
    assert sorted(listed) == sorted(found)
