"""Tests of a clone's files under every line-ending setting of Git."""

import subprocess
from pathlib import Path

import pytest

from ebjdat_serve.bundle import Bundle

ROOT = Path(__file__).parent.parent


def git(*words: str | Path) -> str:
    return subprocess.run(["git", *map(str, words)], capture_output=True, encoding="utf-8", check=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The last commit, cloned as Git for Windows does by default."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a Git checkout")
    home = tmp_path_factory.mktemp("clone") / "repo"
    git("clone", "--quiet", "--config", "core.autocrlf=true", ROOT, home)
    return home


def test_a_clone_with_autocrlf_has_every_byte_of_the_commit(clone):
    assert git("-C", clone, "config", "core.autocrlf").strip() == "true"
    told = {line.split("\t")[1]: line.split() for line in git("-C", clone, "ls-files", "--eol").splitlines()}
    rewritten = [name for name, (index, here, *_) in told.items() if index.partition("/")[2] != here.partition("/")[2]]
    assert not rewritten
    assert len(told) > 200


def test_the_bundle_of_a_clone_with_autocrlf_loads(clone):
    bundle = Bundle.load(clone / "ebjdat_serve" / "models" / "cifar10")
    assert len(bundle.manifest.files) > 10


def test_the_scripts_of_a_clone_with_autocrlf_run(clone):
    scripts = [clone / "clients" / "curl.sh", *(clone / ".ci").glob("run")]
    for script in scripts:
        done = subprocess.run(["bash", "-n", script], capture_output=True, encoding="utf-8", check=False)
        assert (done.returncode, done.stderr) == (0, ""), script
    usage = subprocess.run(["bash", clone / "clients" / "curl.sh"], capture_output=True, encoding="utf-8", check=False)
    assert "usage: clients/curl.sh IMAGE" in usage.stderr
