"""Tests of the wheel in a temporary environment: with [cpu] it serves without torch; without an extra the error names both."""

import subprocess
import sys

import httpx2
import pytest

from ebjdat_serve.server.settings import SHIPPED
from tests.conftest import ROOT, serving

pytestmark = [pytest.mark.network, pytest.mark.slow]
OFFLINE = ("Failed to establish a new connection", "Temporary failure in name resolution", "Connection refused", "Network is unreachable")


def pip(python, *arguments):
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(text in done.stderr for text in OFFLINE):
        pytest.skip("needs the package registries, which do not answer")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    home = tmp_path_factory.mktemp("install")
    subprocess.run([sys.executable, "-m", "venv", str(home / "venv")], check=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(home), str(ROOT)]
    subprocess.run(wheel, check=True, capture_output=True)
    interpreter = home / "venv" / "bin" / "python"
    print("\ninstalling the wheel into a fresh environment", flush=True)
    pip(interpreter, str(next(home.glob("*.whl"))))
    return interpreter


def test_without_an_extra_the_error_names_both_then_the_cpu_extra_serves_without_torch(python, tmp_path, picture):
    serve = python.parent / "ebjdat-serve"
    bare = subprocess.run([str(serve), "serve"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert bare.returncode == 2
    assert "[cpu]" in bare.stderr
    assert "[gpu]" in bare.stderr
    pip(python, "onnxruntime")
    has_torch = subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode == 0
    assert not has_torch
    verified = subprocess.run([str(serve), "verify"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert verified.returncode == 0, verified.stderr
    wrong = subprocess.run(
        [str(serve), "serve", "--engine", "torch"], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert wrong.returncode == 2
    assert "needs PyTorch" in wrong.stderr
    shipped = (
        python.parent.parent / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages" / SHIPPED.relative_to(ROOT)
    )
    with serving(shipped, tmp_path / "log", executable=(str(serve),)) as server:
        assert httpx2.post(f"{server.url}/classify", content=picture).status_code == 200
        assert httpx2.get(f"{server.url}/generate", params={"class": 3, "steps": 2}).status_code == 200
        assert httpx2.get(f"{server.url}/docs-assets/swagger-ui-bundle.js").status_code == 200
