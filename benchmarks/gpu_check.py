#!/usr/bin/env python3
"""On a GPU machine, run the tests marked gpu and the served paths, and write what happened: `make gpu-check PYTHON=python3`.

Needs torch, NumPy, Pillow, safetensors and an NVIDIA GPU; what else is missing (onnxruntime-gpu, pytest) is named, not installed.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Write the report; return 2 where there is no GPU to check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", type=Path, help="the report, Markdown")
    parser.add_argument("--json", type=Path, help="the rows, a flat list")
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
    rows = torch_rows()
    lines += ["| what | value | unit |", "|---|---|---|", *(f"| {row['name']} | {row['value']:.4g} | {row['unit']} |" for row in rows)]
    lines += ["", *onnx_lines(), "", *tests()]
    report = "\n".join(lines) + "\n"
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
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


def torch_rows() -> list[Row]:
    """Return the rates of the torch engine's two functions on the GPU, and how far its score is from the CPU's."""
    import numpy as np

    from ebjdat_serve.bundle import Bundle
    from ebjdat_serve.engines.eager import TorchEngine
    from ebjdat_serve.selftest import worst
    from ebjdat_serve.server.settings import SHIPPED

    bundle = Bundle.load(SHIPPED)
    gpu, cpu = TorchEngine(bundle, "cuda"), TorchEngine(bundle, "cpu")
    size = bundle.manifest.input
    rows: list[Row] = []
    for batch in (1, 32, 256):
        image = np.random.default_rng(0).random((batch, 3, size.height, size.width), dtype=np.float32)
        label = np.zeros(batch, np.int64)
        images = rate(lambda x=image: gpu.classify(x)) * batch  # type: ignore[misc]
        steps = rate(lambda x=image, y=label: gpu.score(x, y))  # type: ignore[misc]
        difference = worst(gpu.score(image, label)[0], cpu.score(image, label)[0])
        rows += [
            {"name": f"torch classify, batch {batch}", "value": images, "unit": "images/s"},
            {"name": f"torch score, batch {batch}", "value": steps, "unit": "steps/s"},
            {"name": f"ratio difference of the score, GPU and CPU, batch {batch}", "value": difference, "unit": ""},
        ]
    return rows


def rate(call: Callable[[], object], seconds: float = 3.0) -> float:
    """Return calls per second; each call ends with its result on the host."""
    for _ in range(5):
        call()
    done, started = 0, time.monotonic()
    while time.monotonic() - started < seconds:
        call()
        done += 1
    return done / (time.monotonic() - started)


def onnx_lines() -> list[str]:
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
