"""On a GPU: the same answers as the CPU, on every road that is installed."""

import numpy as np
import pytest

from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EngineError
from ebjdat_serve.selftest import TOLERANCE, compare
from ebjdat_serve.sgld import Chains, Prior

pytestmark = pytest.mark.gpu


@pytest.fixture
def expected(shipped):
    from safetensors.numpy import load_file

    return load_file(shipped.path / "selftest.safetensors")


@pytest.fixture
def chains(shipped):
    prior = Prior.load(shipped.path / "prior.safetensors")
    return Chains.start(prior, shipped.manifest.sampler, np.arange(-1, 10), seed=3)


def engine_or_skip(bundle, kind, device, precision="fp32"):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    try:
        return load_engine(bundle, kind, device, 1, precision)
    except EngineError as error:
        pytest.skip(f"not installed here: {error}")


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_fp32_gives_the_self_tests_answers(shipped, expected, kind, device):
    engine = engine_or_skip(shipped, kind, device)
    assert device in engine.provider.lower()
    assert max(compare(engine, expected["image"], expected["label"], expected).values()) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "device", "precision"), [("torch", "cuda", "bf16"), ("onnx", "cuda", "fp16"), ("onnx", "tensorrt", "fp16")]
)
def test_lower_precisions_stay_near(shipped, expected, kind, device, precision):
    engine = engine_or_skip(shipped, kind, device, precision)
    assert max(compare(engine, expected["image"], expected["label"], expected).values()) < (0.1 if precision == "bf16" else 0.01)


@pytest.mark.parametrize(("kind", "device"), [("torch", "cuda"), ("onnx", "cuda"), ("onnx", "tensorrt")])
def test_chains_walk_as_on_the_cpu_and_as_alone(shipped, chains, kind, device):
    engine, cpu = engine_or_skip(shipped, kind, device), load_engine(shipped, "torch", "cpu")
    end = engine.advance(chains, 10)
    np.testing.assert_allclose(end.image, cpu.advance(chains, 10).image, atol=1e-3)
    np.testing.assert_allclose(engine.advance(chains.rows([4]), 10).image[0], end.image[4], atol=1e-3)
    np.testing.assert_array_equal(engine.advance(chains, 10).image, end.image)


def test_more_chains_than_one_graph_moves(shipped, chains):
    engine = engine_or_skip(shipped, "torch", "cuda")
    many = Chains.join([chains] * 30)
    end = engine.advance(many, 2).image
    np.testing.assert_allclose(end[-11:], end[:11], atol=1e-4)


def test_no_operator_of_a_cuda_session_that_matters_runs_on_the_cpu(shipped, chains):
    engine = engine_or_skip(shipped, "onnx", "cuda")
    engine.advance(chains, 1)
    placed = engine.placement()["step"]
    assert placed["CUDAExecutionProvider"] > 5 * placed.get("CPUExecutionProvider", 0)


def test_one_training_step_runs_on_cuda(tmp_path):
    from dataclasses import replace

    import torch

    from training.clock import Clock
    from training.images import load
    from training.presets import DIGITS
    from training.train import train

    preset = replace(DIGITS, epochs=0.5, precision="auto")
    weights = train(preset, load("digits"), tmp_path, init=None, clock=Clock(), device=torch.device("cuda"))
    assert np.isfinite(weights.stat().st_size)
