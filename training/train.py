#!/usr/bin/env python3
"""Train a model and publish a bundle: `python training/train.py [PRESET]`.

With no argument this is the refresh: it picks the best preset for the device and runs
train -> export -> parity -> calibrate -> evaluate -> publish. Each step also runs alone, on a bundle.
"""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ebjdat_serve.wideresnet import WideResNet
from training.adversary import cross_entropy, pgd
from training.errors import TrainingDiverged, TrainingError
from training.images import Dataset, Split, augment, to_device, to_float
from training.methods import Batch, Method
from training.methods.at import AdversarialTraining
from training.methods.ebjdat import EbJdat
from training.presets import PRESETS, Preset
from training.replay import fit_prior
from training.state import State, load_weights, save_weights


class Clock:
    """When training must end: at its deadline, or as soon as the step is done after Ctrl-C or SIGTERM."""

    def __init__(self, minutes: float = math.inf) -> None:
        self.deadline, self.interrupted = time.monotonic() + 60 * minutes, False
        self.usual: dict[signal.Signals, Any] = {}

    def interrupt(self, *_: object) -> None:
        """Take note of a signal."""
        self.interrupted = True

    def listen(self) -> None:
        """Let Ctrl-C and SIGTERM end training after the step at hand; outside training they act as usual."""
        if threading.current_thread() is threading.main_thread():
            self.usual = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}

    def deafen(self) -> None:
        """Give the signals back."""
        for number, handler in self.usual.items():
            signal.signal(number, handler)
        self.usual = {}

    def over(self) -> bool:
        """Return whether to stop now."""
        return self.interrupted or time.monotonic() >= self.deadline


def train(preset: Preset, data: Dataset, folder: Path, *, init: Path | None, clock: Clock, device: torch.device) -> Path:
    """Train one stage in ``folder``, resuming what is there, and return its weights file (EMA applied).

    At the clock's deadline the stage ends cleanly with the weights it has. Raises TrainingDiverged after three rollbacks,
    and KeyboardInterrupt, with the state saved, when it was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, saved, log = folder / "weights.safetensors", folder / "state.pt", folder / "log.jsonl"
    state = new_state(preset, data, init, device)
    if saved.is_file():
        state.restore(saved)
    else:
        state.save(saved)  # there is always a good state to return to
    stream = Stream(preset, data, device)
    total = total_steps(preset, len(data.train))
    held_out = data.selection.first(500)
    since_save = time.monotonic()
    clock.listen()

    while state.step < total and not clock.over():
        started = time.monotonic()
        progress = state.step / total
        for group in state.optimiser.param_groups:
            group["lr"] = state.lr_scale * preset.lr * learning_rate(progress, preset.lr_peak)
        state.model.train(not preset.frozen_norm)
        terms = state.method.terms(state.model, stream.batch(state.step, state.generator), state.generator, progress)
        state.optimiser.zero_grad(set_to_none=True)
        terms.loss.backward()  # type: ignore[no-untyped-call]
        if preset.gradient_clip:
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), preset.gradient_clip)
        state.optimiser.step()
        state.step += 1
        state.update_ema(preset.ema)
        state.seconds += time.monotonic() - started

        row = {"loss": float(terms.loss.detach()), **{name: float(value) for name, value in terms.log.items()}}
        if diverged(row, preset):  # at every step, so that no bad state is ever saved
            roll_back(state, saved, log, row)
            continue
        if state.step % 20 == 0 or state.step == total:
            speed = preset.batch_size * state.step / state.seconds
            write(log, {"step": state.step, "of": total, **row, "images_per_second": round(speed, 1)})
        if state.step % stream.steps_per_epoch == 0 or state.step == total:
            write(log, {"step": state.step, **validate(preset, state.ema, held_out, device)})
        if time.monotonic() - since_save > 45:
            state.save(saved)
            since_save = time.monotonic()

    state.save(saved)
    clock.deafen()
    if clock.interrupted:
        raise KeyboardInterrupt
    if state.step == 0:
        raise TrainingError(f"the time ran out before {preset.name} began; give more --max-minutes, with --resume")
    save_weights(state.ema, weights)
    return weights


def total_steps(preset: Preset, images: int) -> int:
    """Return how many steps the preset's epochs over so many images are."""
    return math.ceil(preset.epochs * (images // preset.batch_size))


def new_state(preset: Preset, data: Dataset, init: Path | None, device: torch.device) -> State:
    """Return a fresh state: seeded weights, or those of ``init``, and an untouched optimiser."""
    torch.manual_seed(preset.seed)
    model = WideResNet(preset.depth, preset.width, len(data.names))
    if init is not None:
        start(model, init)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.autocast = precision(preset, device)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": preset.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimiser = torch.optim.SGD(groups, lr=preset.lr, momentum=preset.momentum, nesterov=True)
    ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator(device).manual_seed(preset.seed)
    return State(model, ema, optimiser, new_method(preset, data, device), generator)


def start(model: WideResNet, init: Path) -> None:
    """Load ``init`` into ``model``; raise TrainingError when it is not weights of this network."""
    try:
        problems = model.load_state_dict(load_weights(init), strict=False)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TrainingError(f"{init} cannot start this network: {error}") from error
    missing = [name for name in problems.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or problems.unexpected_keys:
        raise TrainingError(f"{init} is not of this network: missing {missing[:3]}, unexpected {problems.unexpected_keys[:3]}")


def new_method(preset: Preset, data: Dataset, device: torch.device) -> Method:
    """Return the loss step that the preset names."""
    if preset.method == "at":
        return AdversarialTraining(preset)
    if preset.method == "ebjdat":
        return EbJdat(preset, fit_prior(data.train, len(data.names), preset.prior_rank), device)
    raise ValueError(f"unknown method {preset.method!r}")


class Stream:
    """The two streams of a step: labelled and augmented, and plain images for p(x), both resident on the device."""

    def __init__(self, preset: Preset, data: Dataset, device: torch.device) -> None:
        self.preset, self.flip = preset, data.flip
        self.image = to_device(data.train.image, device)
        self.label = torch.from_numpy(data.train.label).to(device)
        self.steps_per_epoch = len(data.train) // preset.batch_size
        self.epoch, self.order = -1, torch.empty(0)

    def batch(self, step: int, generator: torch.Generator) -> Batch:
        """Return the batch of ``step``: an epoch visits every image once, in an order that (seed, epoch) fixes."""
        p, n, device = self.preset, len(self.label), self.image.device
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            shuffler = torch.Generator().manual_seed(1_000_003 * p.seed + epoch)
            self.epoch, self.order = epoch, torch.randperm(n, generator=shuffler).to(device)
        index = self.order[place * p.batch_size : (place + 1) * p.batch_size]
        image = augment(self.image[index], generator, padding=p.padding, flip=self.flip)
        plain = self.image[torch.randint(0, n, (p.chain_batch,), generator=generator, device=device)]
        return Batch(to_float(image), self.label[index], to_float(plain))


def learning_rate(progress: float, peak: float) -> float:
    """Return the fraction of the top rate: linear up to ``peak`` of the run, linear down to zero at its end."""
    return progress / peak if progress < peak else (1 - progress) / (1 - peak)


def precision(preset: Preset, device: torch.device) -> torch.dtype | None:
    """Return the dtype of the blocks: bf16 where the machine computes in it, else None for fp32."""
    if preset.precision == "fp32":
        return None
    if preset.precision == "bf16":
        return torch.bfloat16
    fast = (
        torch.cuda.is_bf16_supported()
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return torch.bfloat16 if fast else None


def validate(preset: Preset, ema: dict[str, Tensor], split: Split, device: torch.device) -> dict[str, float]:
    """Return clean and PGD-10 accuracy of the averaged weights on held-out training images."""
    model = WideResNet(preset.depth, preset.width, ema["head.weight"].shape[0]).to(device)
    model.load_state_dict(ema)
    model.autocast = precision(preset, device)
    model.eval()
    image, label = to_float(to_device(split.image, device)), torch.from_numpy(split.label).to(device)
    generator = torch.Generator(device).manual_seed(0)
    x_adv = pgd(model, image, label, objective=cross_entropy, eps=preset.eps, step_size=preset.eps / 4, steps=10, generator=generator)
    with torch.no_grad():
        clean, adversarial = ((model(x).argmax(dim=1) == label).float().mean() for x in (image, x_adv))
    return {"selection_clean": float(clean), "selection_pgd10": float(adversarial)}


def diverged(row: dict[str, float], preset: Preset) -> bool:
    """Return whether a loss is not finite, the energy gap left its limit, or the chains sit on the box."""
    return (
        not all(math.isfinite(value) for value in row.values())
        or abs(row.get("energy_gap_neg", 0.0)) > preset.energy_gap_limit
        or row.get("saturation", 0.0) > preset.saturation_limit
    )


def roll_back(state: State, saved: Path, log: Path, row: dict[str, float]) -> None:
    """Return to the last saved state with another random stream and half the rate, and count it.

    Raises TrainingDiverged at the fourth time, or when nothing was saved yet.
    """
    rollbacks = state.rollbacks + 1
    write(log, {"step": state.step, "diverged": rollbacks, **row})
    if rollbacks > 3 or not saved.is_file():
        raise TrainingDiverged(f"diverged {rollbacks} times, last at step {state.step}: {row}; lower lr or w1, or raise energy_penalty")
    state.restore(saved)
    state.rollbacks = rollbacks
    state.lr_scale *= 0.5
    state.generator.manual_seed(1000 * rollbacks + state.step)
    state.save(saved)


def write(log: Path, row: dict[str, float]) -> None:
    """Append one line to the log and show it."""
    line = json.dumps({name: round(value, 4) for name, value in row.items()})
    with log.open("a") as file:
        file.write(line + "\n")
    print(line, flush=True)


def main() -> None:
    """Run the refresh."""
    from ebjdat_serve.errors import EbjdatError
    from training.refresh import best_preset, refresh, runs_root

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", nargs="?", choices=sorted(PRESETS), help="the best one for this device by default")
    parser.add_argument("--run", help="name of the run under EBJDAT_RUNS; PRESET-DATE-TIME by default")
    parser.add_argument("--resume", action="store_true", help="continue --run, or the newest run of the preset")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors) instead of the warm start")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end training cleanly after so long, and go on with what there is"
    )
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="how much to measure (%(default)s)")
    parser.add_argument("--only-train", action="store_true", help="stop when the weights are there; --resume without it does the rest")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="override fields of the preset")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = Clock(options.max_minutes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        preset = override(PRESETS[options.preset or best_preset(device)], options.set)
        run = runs_root() / (options.run or default_run(preset, runs_root(), options.resume))
        if options.resume and not run.exists():
            raise TrainingError(f"{run} does not exist: leave --resume out to start it")
        if run.exists() and not options.resume:
            raise TrainingError(f"{run} exists: --resume continues it, another --run starts afresh")
        home = refresh(preset, run, init=options.init, clock=clock, suite=None if options.only_train else options.suite, device=device)
    except (TrainingError, EbjdatError) as error:
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:
        again = [word for word in sys.argv[1:] if word != "--resume"] + ([] if options.run else ["--run", run.name])
        print(f"interrupted; go on with: {shlex.join([sys.executable, sys.argv[0], *again, '--resume'])}", file=sys.stderr)
        sys.exit(130)
    if options.only_train:
        print(f"trained {home}; export, calibrate, evaluate and publish with --resume --run {run.name}")
        return
    print(f"published {home}\nserve it: make serve MODEL={home.parent}")


def override(preset: Preset, settings: list[str]) -> Preset:
    """Return ``preset`` with FIELD=VALUE settings applied; raise TrainingError naming the fields there are."""
    kinds: dict[str, Any] = {field.name: field.type for field in fields(preset)}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in kinds or kinds[name] not in (int, float, str, bool):
            raise TrainingError(f"--set {setting}: fields are {', '.join(kinds)}")
        try:
            parsed = {"true": True, "false": False}[value] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError):
            raise TrainingError(f"--set {setting}: {name} is a {kinds[name].__name__}") from None
        changes: dict[str, Any] = {name: parsed}
        preset = replace(preset, **changes)
    return preset


def default_run(preset: Preset, root: Path, resume: bool) -> str:
    """Return the newest run of the preset to resume, or a new name."""
    if not resume:
        return f"{preset.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    known = sorted(
        (path.parent for path in root.glob("*/config.json") if (path.parent / preset.name).is_dir()), key=lambda p: p.stat().st_mtime
    )
    if not known:
        raise TrainingError(f"no run of {preset.name} in {root} to resume; leave --resume out, or name it with --run")
    return known[-1].name


if __name__ == "__main__":
    main()
