"""The refresh: train (with its warm start) -> export -> parity -> calibrate -> evaluate -> publish, one step after the other."""

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ebjdat_serve.bundle import Bundle, publish, read_json
from export.parity import check
from export.to_onnx import export
from training.calibrate import calibrate
from training.drafts import draft_bundle
from training.errors import TrainingError
from training.evaluate import SUITES, evaluate
from training.images import Dataset, load
from training.presets import PRESETS, Preset
from training.state import load_position
from training.train import Clock, train


def runs_root() -> Path:
    """Return the folder that runs are written to."""
    return Path(os.environ.get("EBJDAT_RUNS", "~/.cache/ebjdat_serve/runs")).expanduser()


def best_preset(device: torch.device) -> str:
    """Return the preset for this device: ``cifar10`` on a GPU, ``cifar10-small`` on a CPU."""
    return "cifar10" if device.type == "cuda" else "cifar10-small"


def stages(preset: Preset) -> list[Preset]:
    """Return the warm start's stage, if there is one, and the preset's own."""
    if preset.warm_start is None:
        return [preset]
    return [replace(PRESETS[preset.warm_start], seed=preset.seed), preset]


def refresh(preset: Preset, run: Path, *, init: Path | None, clock: Clock, suite: str, device: torch.device) -> Path:
    """Run every step of ``preset`` in ``run`` and return the published bundle; what a run already finished is not done again.

    Raises TrainingError, DataError or EbjdatError with the step's own message.
    """
    data = load(preset.dataset)
    todo = [preset] if init is not None else stages(preset)
    remember(run, todo)
    weights = init
    for stage in todo:
        folder = run / stage.name
        if not (folder / "weights.safetensors").is_file():
            say(f"train {stage.name} in {folder}")
            train(stage, data, folder, init=weights, clock=clock, device=device)
        weights = folder / "weights.safetensors"
    baseline = None
    for stage in todo:
        bundle = finish(stage, data, run / stage.name, suite=suite, baseline=baseline)
        baseline = bundle.path / "metrics.json"
    say(f"publish into {run / 'store'}")
    return publish(bundle, run / "store")


def finish(stage: Preset, data: Dataset, folder: Path, *, suite: str, baseline: Path | None) -> Bundle:
    """Return the evaluated bundle of one stage's weights: export, parity, calibration, evaluation."""
    home = folder / "bundle"
    if (home / "README.md").is_file():
        return Bundle.load(home)
    say(f"export {home}")
    bundle = export(
        draft_bundle(
            folder / "weights.safetensors", stage, data, home, name=stage.name, rollbacks=load_position(folder / "state.pt").rollbacks
        )
    )
    worst = max(check(bundle).items(), key=lambda item: item[1])
    say(f"parity: largest difference {worst[1]:.1e} ({worst[0]})")
    bundle = calibrate(bundle, data)
    say(f"calibrated on {len(data.calibration)} images; evaluate ({suite})")
    return evaluate(bundle, data, SUITES[suite], baseline)


def remember(run: Path, todo: list[Preset]) -> None:
    """Write the configuration of a new run; refuse to continue a run under another configuration."""
    run.mkdir(parents=True, exist_ok=True)
    file = run / "config.json"
    wanted = json.loads(json.dumps([asdict(stage) for stage in todo]))
    if not file.is_file():
        file.write_text(json.dumps(wanted, indent=1) + "\n")
    elif read_json(file) != wanted:
        raise TrainingError(f"{file} holds another configuration: continue it with the same preset and settings, or name a new --run")


def say(text: str) -> None:
    """Print one line of progress, with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
