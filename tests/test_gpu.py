"""Tests on a GPU: the same results as on the CPU, on every installed engine."""

from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pytest

from benchmarks.train_calls import captured
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.counterfactual import counterfactuals, length
from ebjdat_serve.engines import load_engine
from ebjdat_serve.pixels import to_unit
from ebjdat_serve.scheduling import Policy
from ebjdat_serve.selftest import verify
from ebjdat_serve.sgld import Chains, Prior
from tests.conftest import DIGITS
from tests.test_counterfactual import several_steps_a_turn
from tests.test_reach import answers_alike
from tests.test_scheduling import few_beside_many
from tests.test_train_calls import captured_as_called

pytestmark = pytest.mark.gpu


@pytest.fixture
def chains(shipped):
    prior = Prior.load(shipped.path / "prior.safetensors")
    return Chains.start(prior, shipped.manifest.sampler, np.arange(-1, 10), seed=3)


@pytest.fixture
def rehearsed(pytestconfig, monkeypatch):
    """Whether the CPU stands for the GPU, with turns as wide as a GPU's: make gpu-rehearse."""
    if pytestconfig.getoption("--rehearse"):
        monkeypatch.setattr(Policy, "of", lambda engine: Policy(256, False))
    return pytestconfig.getoption("--rehearse")


@pytest.fixture
def engine_or_skip(rehearsed):
    """Skip for what is not installed; what is installed and does not run is a failure."""
    wheels = {("onnx", "cuda"): ["onnxruntime-gpu"], ("onnx", "tensorrt"): ["onnxruntime-gpu", "tensorrt-cu13"]}

    def engine(bundle, kind, device, precision="fp32"):
        if rehearsed and device == "tensorrt":
            pytest.skip("a rehearsal has no TensorRT")
        for wheel in () if rehearsed else wheels.get((kind, device), []):
            try:
                version(wheel)
            except PackageNotFoundError:
                pytest.skip(f"{wheel} is not installed here")
        return load_engine(bundle, kind, "cpu" if rehearsed else device, 1, precision)

    return engine


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_fp32_gives_the_self_tests_answers(shipped, kind, device, engine_or_skip, rehearsed):
    engine = engine_or_skip(shipped, kind, device)
    assert rehearsed or device in engine.provider.lower()
    verify(shipped, engine)


@pytest.mark.parametrize(
    ("kind", "device", "precision"), [("torch", "cuda", "bf16"), ("onnx", "cuda", "fp16"), ("onnx", "tensorrt", "fp16")]
)
def test_lower_precisions_stay_near(shipped, kind, device, precision, engine_or_skip):
    verify(shipped, engine_or_skip(shipped, kind, device, precision))


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_chains_walk_as_on_the_cpu_and_as_alone(shipped, chains, kind, device, engine_or_skip):
    engine, cpu = engine_or_skip(shipped, kind, device), load_engine(shipped, "torch", "cpu")
    end = engine.advance(chains, 10)
    np.testing.assert_allclose(end.image, cpu.advance(chains, 10).image, atol=1e-3)
    np.testing.assert_allclose(engine.advance(chains.rows([4]), 10).image[0], end.image[4], atol=1e-3)
    again = engine.advance(chains, 10).image
    if kind == "torch":
        np.testing.assert_array_equal(again, end.image)
    else:  # ONNX Runtime's convolution gradients add in any order: 5e-7 on an H200
        np.testing.assert_allclose(again, end.image, atol=1e-5)


def test_more_chains_than_one_graph_moves(shipped, chains, engine_or_skip):
    engine = engine_or_skip(shipped, "torch", "cuda")
    many = Chains.join([chains] * 30)
    end = engine.advance(many, 2).image
    np.testing.assert_allclose(end[-11:], end[:11], atol=1e-4)


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda")])
def test_clients_share_turns_of_a_gpus_width(shipped, kind, device, engine_or_skip, rehearsed):
    bundle = Bundle.load(DIGITS) if rehearsed else shipped  # 610 chains take minutes of a CPU
    few_beside_many(engine_or_skip(bundle, kind, device), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler)


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_counterfactuals_are_those_of_the_cpu_and_turns_of_several_steps_find_them(
    shipped, test_images, monkeypatch, kind, device, engine_or_skip
):
    images = to_unit(test_images[0][4::50])
    engine, cpu = engine_or_skip(shipped, kind, device), load_engine(shipped, "torch", "cpu")
    found, expected = (counterfactuals(one, images, norm="l2", radius=4.0) for one in (engine, cpu))
    np.testing.assert_array_equal(found.found, expected.found)
    distances = [length(one.best - one.origin, one.linf) for one in (found, expected)]
    np.testing.assert_allclose(*distances, atol=0.05)
    several_steps_a_turn(engine, images[:3], monkeypatch)


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_views_and_checks_answer_as_on_the_cpu(shipped, test_images, kind, device, engine_or_skip):
    answers_alike(shipped, engine_or_skip(shipped, kind, device), load_engine(shipped, "onnx", "cpu"), to_unit(test_images[0][3::50]))


def test_no_operator_of_a_step_runs_on_the_cpu_but_those_on_shapes(shipped, chains, engine_or_skip, rehearsed):
    if rehearsed:
        pytest.skip("a rehearsal runs every operator on the CPU")
    engine = engine_or_skip(shipped, "onnx", "cuda")
    engine.advance(chains, 1)
    assert engine.placement()["step"].get("CPUExecutionProvider", 0) <= 4  # the batch's size, read from a shape


def test_captured_inner_loops_of_training_end_where_calls_end(monkeypatch, rehearsed):
    import torch

    with captured() if rehearsed else nullcontext():
        captured_as_called(torch.device("cpu" if rehearsed else "cuda"), monkeypatch)


def test_one_training_step_runs_on_cuda(tmp_path, rehearsed):
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file

    from training.data.datasets import load
    from training.loop.clock import Clock
    from training.loop.loop import train
    from training.presets import DIGITS

    preset = replace(DIGITS, epochs=0.5, precision="auto")
    weights = train(preset, load("digits"), tmp_path, init=None, clock=Clock(), device=torch.device("cpu" if rehearsed else "cuda"))
    assert all(torch.isfinite(value).all() for value in load_file(weights).values())
