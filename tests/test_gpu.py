"""On a GPU: the same answers as the CPU."""

import numpy as np
import pytest

from ebjdat_serve.selftest import compare

pytestmark = pytest.mark.gpu


@pytest.fixture
def expected(shipped):
    from safetensors.numpy import load_file

    return load_file(shipped.path / "selftest.safetensors")


def test_torch_on_cuda_gives_the_self_tests_answers(shipped, expected):
    from ebjdat_serve.engines.eager import TorchEngine

    engine = TorchEngine(shipped, "cuda")
    assert "cuda" in engine.provider
    assert max(compare(engine, expected["image"], expected["label"], expected).values()) < 1e-2  # TF32 convolutions


def test_onnx_on_cuda_gives_the_self_tests_answers(shipped, expected):
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    from ebjdat_serve.engines.ort import OnnxEngine

    engine = OnnxEngine(shipped, "cuda")
    assert max(compare(engine, expected["image"], expected["label"], expected).values()) < 1e-2


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
