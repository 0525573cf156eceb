#!/usr/bin/env python3
"""On a GPU machine, run the tests marked gpu and the served paths, and write what happened: `make gpu-check PYTHON=python3`.

Needs torch, NumPy, Pillow, safetensors and an NVIDIA GPU; what else is missing (onnxruntime-gpu, pytest) is named, not installed.
"""

import argparse
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Write the report; return 2 where there is no GPU to check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="the report, Markdown")
    options = parser.parse_args()
    missing = [name for name in ("torch", "numpy", "PIL", "safetensors") if find_spec(name) is None]
    if missing:
        print(f"gpu-check needs {', '.join(missing)}: install them, or name another interpreter with PYTHON=", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print("gpu-check needs an NVIDIA GPU that torch sees; there is none here, so nothing was measured", file=sys.stderr)
        return 2
    lines = ["# What ran on a GPU", "", f"{torch.cuda.get_device_name(0)}, Python {platform.python_version()}, {versions()}", ""]
    lines += ["| path | batch | images or steps per second |", "|---|---|---|", *torch_rows()]
    lines += ["", *onnx_rows(), "", *tests()]
    report = "\n".join(lines) + "\n"
    print(report)
    if options.write:
        options.write.write_text(report)
    return 0


def versions() -> str:
    """Return the versions of what matters."""
    found = []
    for name in ("torch", "onnxruntime-gpu", "litserve", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)


def torch_rows() -> list[str]:
    """Return the torch engine's served functions on the GPU, compared with its own CPU answers."""
    import numpy as np

    from ebjdat_serve.bundle import Bundle
    from ebjdat_serve.engines.eager import TorchEngine
    from ebjdat_serve.selftest import worst
    from ebjdat_serve.server.settings import SHIPPED

    bundle = Bundle.load(SHIPPED)
    gpu, cpu = TorchEngine(bundle, "cuda"), TorchEngine(bundle, "cpu")
    size = bundle.manifest.input
    rows = []
    for batch in (1, 32, 256):
        image = np.random.default_rng(0).random((batch, 3, size.height, size.width), dtype=np.float32)
        label = np.zeros(batch, np.int64)
        difference = worst(gpu.score(image, label)[0], cpu.score(image, label)[0])
        rows.append(f"| torch classify | {batch} | {rate(lambda x=image: gpu.classify(x)) * batch:.0f} images/s |")
        steps = rate(lambda x=image, y=label: gpu.score(x, y))
        rows.append(f"| torch Langevin score | {batch} | {steps:.0f} steps/s (GPU against CPU {difference:.1e}) |")
    return rows


def rate(call: object, seconds: float = 3.0) -> float:
    """Return calls per second; each call ends with its result on the host."""
    assert callable(call)
    for _ in range(5):
        call()
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        call()
        done += 1
    return done / (time.monotonic() - started)


def onnx_rows() -> list[str]:
    """Return what ONNX Runtime does on the GPU, or why that is unmeasured."""
    if find_spec("onnxruntime") is None:
        return ["ONNX Runtime: unmeasured, onnxruntime-gpu is not installed here."]
    from ebjdat_serve.bundle import Bundle
    from ebjdat_serve.engines.ort import OnnxEngine
    from ebjdat_serve.errors import EngineError
    from ebjdat_serve.server.settings import SHIPPED

    try:
        engine = OnnxEngine(Bundle.load(SHIPPED), "cuda")
    except EngineError as error:
        return [f"ONNX Runtime: unmeasured, {error}"]
    import numpy as np

    image = np.random.default_rng(0).random((256, 3, 32, 32), dtype=np.float32)
    return [f"ONNX Runtime on {engine.provider}: classify, batch 256, {rate(lambda: engine.classify(image)) * 256:.0f} images/s."]


def tests() -> list[str]:
    """Run the tests marked gpu; return their closing line, or why they did not run."""
    if find_spec("pytest") is None or find_spec("hypothesis") is None:
        return ["Tests marked gpu: not run, pytest or hypothesis is not installed here."]
    import subprocess

    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [f"Tests marked gpu: {done.stdout.strip().splitlines()[-1]}"]


if __name__ == "__main__":
    sys.exit(main())
