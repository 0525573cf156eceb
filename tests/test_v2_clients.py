"""Stock clients of the Open Inference Protocol v2, unchanged, each in an environment of its own: their pins clash with ours."""

import json
import os
import subprocess

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.test_v2 import FILES, MODEL, PIXELS, agree, expected

__all__ = ["expected"]  # the fixture: what /classify and /energy say of the images
pytestmark = pytest.mark.slow
CLIENTS = {"TRITON": "tritonclient[http]==2.73.0", "KSERVE": "kserve==0.21.0"}


def asked(client, address, folder):
    """Return what the client's script says, run by the Python that EBJDAT_<CLIENT>_PYTHON names."""
    variable, package = f"EBJDAT_{client}_PYTHON", CLIENTS[client]
    if not (python := os.environ.get(variable)):
        make = f"python3.11 -m venv DIR && DIR/bin/pip install '{package}' && export {variable}=DIR/bin/python"
        pytest.skip(f"needs {package} in an environment of its own: {make}")
    np.save(folder / "images.npy", PIXELS)
    for i, file in enumerate(FILES):
        (folder / f"{i}.png").write_bytes(file)
    command = [python, str(ROOT / "tests" / f"{client.lower()}_client.py"), address, MODEL.name, MODEL.version, str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(infers, expected, n):
    assert len(infers) == n
    for name, said in infers.items():
        assert (said["id"], said["model"]) == (name, MODEL.name)
        agree({output: np.array(values) for output, values in said["outputs"].items()}, expected)


def test_tritonclient_works_unchanged(live, expected, tmp_path):
    said = asked("TRITON", live.url.removeprefix("http://"), tmp_path)
    check(said["infers"], expected, 2 * 2 * 3 * 3 * 2 + 8)
    check(said["aio"]["infers"], expected, 9)
    assert {one["version"] for one in said["infers"].values()} == {MODEL.version}
    assert (said["ready"], said["unready"], said["aio"]["ready"]) == ([True] * 4, [False] * 2, [True] * 3)
    assert said["server"]["name"] == "ebjdat_serve"
    assert said["metadata"] == [said["aio"]["metadata"]] * 2
    assert said["metadata"][0]["versions"] == [MODEL.version]
    assert said["config"]["name"] == said["index"][0]["name"] == MODEL.name
    for stats in said["stats"]:
        assert stats["model_stats"][0]["version"] == MODEL.version
    for name, status, why in (
        ("model", "404", "none"),
        ("version", "404", MODEL.version),
        ("output", "400", "'x'"),
        ("load", "404", "path"),
    ):
        assert said["errors"][name][0] == status
        assert why in said["errors"][name][1]


def test_kserves_client_works_unchanged(live, expected, tmp_path):
    said = asked("KSERVE", live.url, tmp_path)
    check(said["infers"], expected, 2 * 2 * 3 * 2)
    assert (said["ready"], said["unready"]) == ([True] * 4, [False])
    assert f"served in version {MODEL.version}" in said["errors"][f"{MODEL.name}/versions/0"]
    assert "no model here is named none" in said["errors"]["none"]
