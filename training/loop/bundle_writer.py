"""Write a draft bundle from trained weights: manifest, weights, prior and the self-test's expected outputs."""

import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ebjdat_serve.bundle import Bundle, sha256, write_json
from ebjdat_serve.exporting.reference import write_selftest
from ebjdat_serve.manifest import Licence, Manifest, Provenance
from ebjdat_serve.pixels import to_unit
from training.config import Preset, describe
from training.data.datasets import Dataset
from training.data.sources import SOURCES
from training.loop.state import Position
from training.methods.replay import prior_of


@dataclass(frozen=True)
class Origin:
    """How a run began: the checkout's commit, the time (UTC), and the sha256 of the weights given by --init, if any."""

    git: str
    started: str
    init_sha256: str


def draft_bundle(weights: Path, preset: Preset, data: Dataset, folder: Path, origin: Origin, position: Position, planned: int) -> Bundle:
    """Write a bundle without graphs, calibration and figures into ``folder``, replacing its content."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copyfile(weights, folder / "weights.safetensors")
    prior_of(data, preset.prior_rank).save(folder / "prior.safetensors")
    now = datetime.now(UTC)
    manifest = Manifest(
        name=preset.name,
        version=f"{now:%Y.%m.%d}-{sha256(folder / 'weights.safetensors')[:8]}",
        architecture=preset.architecture.described(),
        labels=list(data.names),
        input=data.input,
        sampler=preset.sample,
        provenance=Provenance(
            git=origin.git,
            preset=preset.name,
            seed=preset.seed,
            dataset=data.name,
            data_sha256=data.sha256,
            steps=position.step,
            planned_steps=planned,
            rollbacks=position.rollbacks,
            init_sha256=origin.init_sha256,
            started=origin.started,
            configuration=without_paths(describe(preset)),
        ),
        files={},
        licence=licence_of(preset, data, origin),
    )
    write_json(folder / "bundle.json", asdict(manifest))
    bundle = Bundle.draft(folder).update("weights.safetensors", "prior.safetensors")
    write_selftest(bundle, to_unit(data.selection.image[:8]))
    return bundle.update("selftest.safetensors")


def licence_of(preset: Preset, data: Dataset, origin: Origin) -> Licence:
    """Return the licences of a model of a named data set; unknown of others, of further images, and of given weights."""
    more = preset.extra or getattr(preset.method, "seeds", "gaussian") not in ("gaussian", "noise") or origin.init_sha256
    return SOURCES[data.name].terms if data.name in SOURCES and not more else Licence()


def without_paths(configuration: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with every path cut to its last part: a published bundle names no folder of the machine."""
    return {
        name: without_paths(value) if isinstance(value, dict) else Path(value).name if isinstance(value, str) and os.sep in value else value
        for name, value in configuration.items()
    }


def git_commit() -> str:
    """Return the checkout's commit, with ``-dirty`` when the tree differs from it, or ``unknown`` outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, encoding="utf-8", check=True).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if dirty else "")
