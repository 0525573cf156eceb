"""Tests of multi-process training: two gloo processes with half the batch each follow the trajectory of one, on frozen norms."""

import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.conftest import ROOT
from tests.test_training import losses
from training.config import stages
from training.data.datasets import load
from training.distributed import Noise, Ranks, connect
from training.errors import TrainingError
from training.loop import loop
from training.loop.clock import Clock
from training.loop.loop import train
from training.methods.replay import ChainConfig
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


@pytest.fixture
def pair(monkeypatch):
    """The first of two ranks, whose collectives return at once what they were given, counted by name."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    asked = Counter()
    honest = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(name):
        def count(*given, **options):
            asked[name] += 1
            return honest[name](*given, **options)

        return count

    for name in honest:
        monkeypatch.setattr(dist, name, counted(name))
    monkeypatch.setattr(loop, "DistributedDataParallel", lambda model: model)  # whose own reduction the false group does not have
    yield asked
    dist.destroy_process_group()


@pytest.mark.parametrize(("method", "gathers"), [("fgsm-rs", 0), ("ebjdat-aligned-jem++", 1)])
def test_a_step_of_two_ranks_is_one_reduction_beside_that_of_the_gradients(pair, tmp_path, monkeypatch, method, gathers):
    """Log, divergence, time and interruption in one; the gather is the relative alignment's, which is no mean over ranks."""
    reads, tolist = Counter(), torch.Tensor.tolist

    def seen(self):
        reads["scalars"] += self.ndim == 1 and len(self) > 3
        return tolist(self)

    stage = replace(preset(method, "digits"), epochs=0.5, warm_start=None)
    if gathers:
        stage = replace(stage, method=replace(stage.method, chains=ChainConfig(batch=8, buffer_size=80, steps=1)))
    monkeypatch.setattr(torch.Tensor, "tolist", seen)
    train(stage, load("digits"), tmp_path, init=None, clock=Clock(), device=torch.device("cpu"), ranks=Ranks(0, 2))
    steps = reads["scalars"]
    assert steps == 9
    assert pair["all_reduce"] == steps + 2  # whether the time is over before the first, and whether it was interrupted after the last
    states = 3  # are saved, with the chains of both
    assert pair["all_gather"] == gathers * (steps + states)


def test_ranks_on_gpus_have_a_device_a_timeout_and_a_group_that_waits_for_downloads(monkeypatch):
    """NCCL ends a run whose collective takes ten minutes, and the first rank may be downloading for longer."""
    made, set_to = {}, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: made.update(default=(backend, options)))
    monkeypatch.setattr(dist, "new_group", lambda **options: made.update(hosts=options) or "the hosts")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    ranks = connect()
    device = torch.device("cuda", 1)
    assert (set_to, made["default"][0], made["default"][1]["device_id"]) == ([device], "nccl", device)
    assert made["hosts"]["backend"] == "gloo"
    assert made["hosts"]["timeout"] > timedelta(days=1) > made["default"][1]["timeout"]
    waited = []
    monkeypatch.setattr(dist, "barrier", lambda group=None: waited.append(group))
    monkeypatch.setattr(dist, "broadcast_object_list", lambda values, group=None: waited.append(group))
    ranks.wait()
    ranks.agree("run")
    assert waited == ["the hosts", "the hosts"]


WAITING = """
import sys, time, datetime
from training import distributed
distributed.torch.cuda.is_available = lambda: True  # GPUs, whose collectives are gloo's here
distributed.torch.cuda.set_device = lambda device: None
honest = distributed.dist.init_process_group
distributed.dist.init_process_group = lambda backend, timeout, device_id: honest("gloo", timeout=timeout)
distributed.TIMEOUT = datetime.timedelta(seconds=1)
ranks = distributed.connect()
if ranks.rank == 0:
    time.sleep(2.5)  # a download
ranks.wait()
print(ranks.agree(f"of rank {ranks.rank}"))
ranks.leave()
"""


def test_ranks_wait_longer_for_the_first_than_a_collective_may_take(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared = {**os.environ, **address, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*process.communicate(timeout=60), process.returncode) for process in started]
    assert [(out, status) for out, _, status in ended] == [("of rank 0\n", 0)] * 2, [err for _, err, _ in ended]
