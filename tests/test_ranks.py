"""Tests of multi-process training: two gloo processes with half the batch each follow the trajectory of one, on frozen norms."""

import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.test_training import losses
from training.config import stages
from training.data.datasets import load
from training.distributed import Noise, Ranks
from training.errors import TrainingError
from training.loop.clock import Clock
from training.loop.loop import train
from training.presets import preset

TOLERANCE = 1e-3  # relative: halves are summed in another order than the whole, and 40 steps carry the rounding on


def run(folder, name, method, world, init, settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(world), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *(torchrun if world > 1 else []), str(ROOT / "training" / "train.py"), method, "--data", "digits"]
    command += ["--name", name, "--only-train", "--threads", "1", "--init", str(init), "--set", "epochs=2.4", *settings]
    environment = {**os.environ, "EBJDAT_RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / name / f"digits-{method}"


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    stage = replace(stages(preset("ebjdat-aligned", "digits"))[0], epochs=3)
    return train(stage, load("digits"), tmp_path_factory.mktemp("warm"), init=None, clock=Clock(), device=torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ebjdat-aligned", ["chains.steps=1", "attack.steps=1"]),  # relative alignment, chains, ASAM
        ("dat", ["attack.steps=1", "auc_threshold=0.3", "window=64", "attack.start=uniform"]),
    ],
)
def test_two_ranks_train_as_one_does(tmp_path, warm, method, settings):
    alone, pair = (run(tmp_path, f"world{world}", method, world, warm, settings) for world in (1, 2))
    expected, found = losses(alone), losses(pair)
    assert list(expected) == list(found) == [20, 40, 41]
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=TOLERANCE)
    a, b = (load_file(folder / "weights.safetensors") for folder in (alone, pair))
    start = load_file(warm)
    moved = max(float((value - start[name]).abs().max()) for name, value in a.items())
    apart = max(float((b[name] - value).abs().max()) for name, value in a.items())
    assert moved > 5e-3
    assert apart < 0.02 * moved
    kept = [torch.load(folder / "state.pt", weights_only=True)["method_state"] for folder in (alone, pair)]
    for name, value in kept[0].items():  # the first rank saved the chains of both
        assert kept[1][name].shape == value.shape
        assert (kept[1][name] - value).abs().mean() < 1e-3


def test_ranks_share_one_stream_of_noise():
    whole = Noise.seeded(3)
    parts = [Noise.seeded(3, ranks=Ranks(rank, 2)) for rank in (0, 1)]
    for draw in ("normal", "uniform"):
        expected = getattr(whole, draw)(8, 3)
        torch.testing.assert_close(torch.cat([getattr(part, draw)(4, 3) for part in parts]), expected)
    expected = whole.integers(100, 8)
    assert torch.cat([part.integers(100, 4) for part in parts]).tolist() == expected.tolist()


def test_what_cannot_be_divided_is_refused():
    assert Ranks(0, 2).part("batch_size", 64) == 32
    with pytest.raises(TrainingError, match="batch_size=65 cannot be divided among 2"):
        Ranks(0, 2).part("batch_size", 65)
