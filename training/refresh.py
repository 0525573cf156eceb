"""The refresh: train (with its warm start) -> export -> parity -> calibrate -> evaluate -> gate -> publish, one after the other."""

import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ebjdat_serve.bundle import MANIFEST, SERVED, Bundle, read_json, sha256, write_json
from ebjdat_serve.card import retitled
from ebjdat_serve.contract import Input
from ebjdat_serve.folders import ensure_folder, folder, unwritable
from ebjdat_serve.locking import Held, exclusive_lock
from ebjdat_serve.rows import rows_where
from ebjdat_serve.store import next_revision, publish, withhold
from training.config import Preset, continuing, describe, stages, together, work
from training.data.datasets import Dataset, load, load_extra
from training.distributed import Ranks
from training.errors import HeldBack, TrainingError
from training.loop.bundle_writer import Origin, draft_bundle, git_commit
from training.loop.clock import Clock
from training.loop.loop import total_steps, train
from training.loop.start import check_images
from training.loop.state import Position, check_weights, load_position, mean_weights, save_weights
from training.report import write_report

log = logging.getLogger("training")


def runs_root() -> Path:
    """Return the folder that runs are written to."""
    return folder("EBJDAT_RUNS", "runs")


def refresh(
    preset: Preset,
    run: Path,
    *,
    init: Path | None,
    clock: Clock,
    suite: str | None,
    device: torch.device,
    ranks: Ranks = Ranks(),
    tensorboard: bool = False,
    store: Path | None = None,
    force: bool = False,
) -> Path:
    """Run every step of ``preset`` in ``run`` and return the bundle published in ``store``; finished steps are not repeated.

    ``store`` is the run's own by default. Raises HeldBack for a model held back as a candidate, unless ``force``.

    Without a ``suite``, and on every rank but the first, only the training is done, which needs just torch, NumPy, Pillow
    and safetensors, and the path of the weights is returned. Raises TrainingError, DataError or EbjdatError with the step's message.
    """
    if init is not None and not init.is_file():
        raise TrainingError(f"{init}, the weights of --init, does not exist")
    first = ranks.rank == 0
    with lock(run) if first else nullcontext():
        if not first:
            ranks.wait()  # the first rank may be downloading
        data = load(preset.dataset, Input(preset.size, preset.size) if preset.size else None)
        check_images(preset, data)
        todo = [filled(stage, len(data.train), tells=first) for stage in (continuing(preset) if init is not None else stages(preset))]
        origin = remember(run, todo, init, data) if first else None
        if first:
            ranks.wait()
        weights = train_stages(todo, data, run, init=init, clock=clock, device=device, ranks=ranks, tensorboard=tensorboard)
        ranks.leave()
        if suite is None or origin is None:
            return weights
        last, baseline = len(todo) - 1, None
        if (start := together(todo, last).start - 1) >= 0:  # the card compares with where the last stage started
            baseline = finish(todo, start, data, run, suite=suite, baseline=None, origin=origin).path / "metrics.json"
        bundle = finish(todo, last, data, run, suite=suite, baseline=baseline, origin=origin)
        return deliver(bundle, data, run, store or run / "store", force)


def deliver(bundle: Bundle, data: Dataset, run: Path, store: Path, force: bool) -> Path:
    """Publish a finished bundle; if it is worse than the store's current one, make it a candidate and raise HeldBack."""
    from training.evaluation.gate import judge

    say(f"compare with the current version of {store}")
    verdict = judge(bundle, store, data)
    for row in verdict.rows:
        say(f"  {row}")
    write_json(run / "gate.json", {"reason": verdict.reason, "against": verdict.against, "comparison": verdict.comparison()})
    if verdict.reason and not force:
        home = withhold(bundle, store, verdict.reason, verdict.comparison())
        raise HeldBack(f"{bundle.manifest.name}@{bundle.manifest.version} is not published: {verdict.reason}\nit is a candidate, {home}")
    say(f"publish into {store}")
    there = store / f"{bundle.manifest.name}-{bundle.manifest.version}"
    if there.is_dir() and Bundle.draft(there).manifest != bundle.manifest:  # the same model with more figures
        bundle = retitled(bundle, next_revision(bundle, store))
    # it passed, which overrides an earlier hold-back; it was not compared with anything published meanwhile
    return publish(bundle, store, force=True, after=None if force else verdict.pointed)


def filled(stage: Preset, images: int, *, tells: bool) -> Preset:
    """Return ``stage`` with a batch size that ``images`` fill: at most half of them, a multiple of 8 where possible."""
    if images >= stage.batch_size:
        return stage
    half = max(1, images // 2)
    size = half - half % 8 or half
    if tells:
        say(f"{stage.name}: {images} training images do not fill a batch of {stage.batch_size}: batch_size={size}")
    return replace(stage, batch_size=size)


def train_stages(
    todo: list[Preset], data: Dataset, run: Path, *, init: Path | None, clock: Clock, device: torch.device, ranks: Ranks, tensorboard: bool
) -> Path:
    """Train or resume each stage from the weights that it starts with, and return the path of the weights to publish."""
    given: list[Path] = []  # by each stage, to those after it
    for stage in todo:
        if not total_steps(stage, len(data.train)):
            raise TrainingError(f"{stage.name} has nothing to train: its epochs are {stage.epochs:g}, give it more with --set")
    for i, stage in enumerate(todo):
        folder, group = run / stage.name, together(todo, i)
        taken = [load_position(run / other.name / "state.pt").step for other in todo[i:]]
        left = [max(0, total_steps(other, len(data.train)) - step) for other, step in zip(todo[i:], taken, strict=True)]
        unfinished = left[0] > 0 or not (folder / "weights.safetensors").is_file()
        begun = any(taken[group.stop - i :])  # a stage that ran out of time is not continued once a later one started from it
        if ranks.agree(unfinished and not begun):
            if ranks.rank == 0:
                say(f"train {stage.name} in {folder}")
            ahead = [steps * work(other) for steps, other in zip(left, todo[i:], strict=True)]
            clock.allot((ahead[0] + 1) / (sum(ahead) + 1))
            start = given[group.start - 1] if group.start else init
            train(stage, data, folder, init=start, clock=clock, device=device, ranks=ranks, tensorboard=tensorboard)
            if ranks.rank == 0:
                write_report(folder, stage)
        else:
            if ranks.rank == 0:
                check_weights(folder)
            ranks.wait()
        if stage.averaged_with is not None:
            if ranks.rank == 0:
                save_weights(mean_weights([given[-1], folder / "weights.safetensors"]), weights_given(stage, folder))
            ranks.wait()
        given.append(weights_given(stage, folder))
    return given[-1]


def weights_given(stage: Preset, folder: Path) -> Path:
    """Return the file of the weights that a stage gives: its own, or their mean with those of the stage that it is averaged with."""
    return folder / ("weights.safetensors" if stage.averaged_with is None else "averaged.safetensors")


def reached(todo: list[Preset], i: int, run: Path) -> Position:
    """Return how far stage i is: steps and seconds with those of the run that it is averaged with, rollbacks of all until there."""
    positions = [load_position(run / stage.name / "state.pt") for stage in todo[: i + 1]]
    own = positions[together(todo, i).start :]
    return Position(sum(one.step for one in own), sum(one.seconds for one in own), sum(one.rollbacks for one in positions))


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Lock the run's folder; raise TrainingError when another process trains there, or it is not writable."""
    with ExitStack() as held:
        try:
            ensure_folder(run, "EBJDAT_RUNS")
            held.enter_context(exclusive_lock(run / ".lock", wait=False))
        except Held as error:
            raise TrainingError(str(error), options=("--run NAME",)) from error
        except OSError as error:
            raise unwritable(run, "EBJDAT_RUNS", error) from error
        yield


def finish(todo: list[Preset], i: int, data: Dataset, run: Path, *, suite: str, baseline: Path | None, origin: Origin) -> Bundle:
    """Return the evaluated bundle of the weights that stage i gives: export, parity, calibration, evaluation.

    For a warm start, which is not the last stage, only the figures that the card compares are measured.
    """
    # imported here: a machine that only trains needs neither ONNX nor SciPy
    from export.parity import check
    from export.to_onnx import export
    from training.calibrate import calibrate
    from training.evaluate import USUAL, evaluate
    from training.evaluation.context import SUITES
    from training.evaluation.evidence import take

    stage, folder = todo[i], run / todo[i].name
    home, weights = folder / "bundle", weights_given(stage, folder)
    parts = USUAL if i == len(todo) - 1 else ("clean", "robustness", "landscape")
    if finished(home, weights, min(SUITES[suite].test, len(data.test))):
        return Bundle.load(home)
    say(f"export {home}")
    planned = sum(total_steps(todo[k], len(data.train)) for k in together(todo, i))
    bundle = export(draft_bundle(weights, stage, data, home, origin, reached(todo, i, run), planned))
    worst = max(check(bundle).items(), key=lambda item: item[1])
    say(f"parity: largest difference {worst[1]:.1e} ({worst[0]})")
    bundle = calibrate(bundle, data)
    say(f"calibrated on {len(data.calibration)} images; evaluate ({suite})")
    return take(bundle, evaluate(bundle, data, SUITES[suite], parts=parts), baseline)[0]


def finished(home: Path, weights: Path, n: int) -> bool:
    """Return whether ``home`` is a bundle of these weights, evaluated on n or more clean test images."""
    if not (home / MANIFEST).is_file():
        return False
    bundle = Bundle.draft(home)
    entry = bundle.manifest.files.get("weights.safetensors")
    clean = [row.n for row in rows_where(bundle.metrics(), "accuracy_clean")]
    whole = {"README.md", *SERVED} <= set(bundle.manifest.files)
    return whole and entry is not None and entry.sha256 == sha256(weights) and max(clean, default=0) >= n


def remember(run: Path, todo: list[Preset], init: Path | None, data: Dataset) -> Origin:
    """Return a run's origin, stored in its config.json; raise TrainingError for another configuration or other data."""
    run.mkdir(parents=True, exist_ok=True)
    file = run / "config.json"
    begun = {
        "init_sha256": sha256(init) if init else "",
        "data_sha256": data.sha256,
        "extra_sha256": load_extra(todo[-1].extra, data).sha256() if todo[-1].extra else "",
        "stages": json.loads(json.dumps([describe(stage) for stage in todo])),
    }
    if not file.is_file():
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(file, {"git": git_commit(), "started": now, **begun})
    known = configuration(run)
    if {name: known.get(name) for name in begun} != begun:
        message = f"{file} holds another configuration or data: continue it with the same preset, settings and images"
        raise TrainingError(message, options=("--run NAME",))
    return Origin(known["git"], known["started"], known["init_sha256"])


def configuration(run: Path) -> dict[str, Any]:
    """Return a run's config.json; raise TrainingError for one that is none."""
    file = run / "config.json"
    known = read_json(file)
    try:
        texts = [known["git"], known["started"], known["stages"][-1]["name"]]
    except (LookupError, TypeError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise TrainingError(f"{file} is damaged, it does not tell the stages of the run", options=("--run NAME",))
    return dict(known)


def say(text: str) -> None:
    """Log a step of the run."""
    log.info("%s", text)
