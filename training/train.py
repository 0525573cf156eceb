#!/usr/bin/env python3
"""Train a model and publish a bundle: `python training/train.py [PRESET | METHOD]`.

With no argument this is the refresh: it picks the best preset for the device and runs
train -> export -> parity -> calibrate -> evaluate -> gate -> publish. Each step also runs alone, on a bundle.
Any method trains on any data: `train.py trades --data digits`. Several GPUs: `torchrun --nproc-per-node 4 training/train.py …`.
"""

import argparse
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, get_args

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ebjdat_serve import logs
from ebjdat_serve.bundle import read_json
from ebjdat_serve.console import advice, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.errors import EbjdatError
from training.data.datasets import NAMED, Dataset
from training.distributed import Ranks, connect
from training.errors import HeldBack, OutOfTime, TrainingError
from training.loop.clock import Clock
from training.loop.run_log import RunLogger, Validator, diverged, log, read, roll_back
from training.loop.start import new_state
from training.loop.state import load_position, save_weights
from training.loop.stream import Stream, steps_per_epoch
from training.methods import StepContext, Terms
from training.methods.sharpness import perturbed
from training.overrides import listing, override
from training.presets import BUDGETS, METHODS, PRESETS, Preset, preset
from training.report import write_report

HELD_BACK = 3
"""Exit status of a refresh whose model stays a candidate."""


def train(
    preset: Preset,
    data: Dataset,
    folder: Path,
    *,
    init: Path | None,
    clock: Clock,
    device: torch.device,
    ranks: Ranks = Ranks(),
    tensorboard: bool = False,
) -> Path:
    """Train one stage in ``folder``, resuming what is there, and return its weights file (EMA applied).

    At the clock's deadline the stage ends cleanly with the weights it has. Raises TrainingDiverged after too many rollbacks,
    and KeyboardInterrupt, with the state saved, when it was interrupted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights, saved = folder / "weights.safetensors", folder / "state.pt"
    if ranks.rank == 0:
        weights.unlink(missing_ok=True)  # what stands here at the end is of this state
    state = new_state(preset, data, init, device, ranks)
    stream = Stream(preset, data, device, state.noise)
    model = DistributedDataParallel(state.model) if ranks.world > 1 else state.model
    parameters = list(state.model.parameters())
    judge, spare = Validator(preset, data, device), stream.saturation()
    if ranks.agree(load_position(saved).step > 0):  # at step 0 ``init`` decides: it may have been trained on since
        state.restore(saved)
    else:
        state.save(saved)  # there is always a good state to return to
    total = total_steps(preset, len(data.train))
    watch = RunLogger(folder, preset, total, state.step, writes=ranks.rank == 0, tensorboard=tensorboard)
    since_save = time.monotonic()

    with clock.listening():
        while state.step < total and not ranks.any(clock.over(), device):
            started = time.monotonic()
            progress = state.step / total
            for group in state.optimiser.param_groups:
                group["lr"] = state.lr_scale * preset.lr * learning_rate(progress, preset.lr_peak, preset.schedule)
            state.model.train(not preset.frozen_norm)
            now = StepContext(preset.threat, state.noise, progress)
            batch = preset.method.solve(state.model, stream.batch(state.step), state.memory, now)  # x_adv and x_neg
            terms = descend(model, lambda: preset.method.loss(model, batch, state.memory, now), preset, progress)  # noqa: B023
            length = torch.nn.utils.clip_grad_norm_(parameters, preset.gradient_clip or math.inf)
            row = read(terms, length, ranks)  # waits for the device
            if ranks.any(diverged(row, preset, spare), device):  # before the step, so that no weights are ever not finite
                roll_back(state, saved, watch, row, preset.rollbacks)
                continue
            state.optimiser.step()
            state.step += 1
            state.update_ema(preset.ema)
            state.seconds += time.monotonic() - started
            if state.step % 20 == 0 or state.step == total:
                speed = preset.batch_size * state.step / state.seconds
                watch.write({"step": state.step, "of": total, **row, "images_per_second": round(speed, 1)})
            if state.step % stream.steps_per_epoch == 0 or state.step == total:
                state.save(saved)  # the look takes its time
                figures, samples = judge.look(state.ema)
                watch.write({"step": state.step, **figures})
                watch.picture(state.step, samples)
            if ranks.any(time.monotonic() - since_save > preset.save_seconds, device):
                state.save(saved)
                since_save = time.monotonic()

        state.save(saved)
        interrupted = ranks.any(clock.interrupted, device)
    watch.close()
    if interrupted:
        raise KeyboardInterrupt
    if state.step == 0:
        raise OutOfTime(f"the time ran out before {preset.name} began")
    if ranks.rank == 0:
        save_weights(state.ema, weights)
        write_report(folder, preset)
    ranks.wait()  # others start their next stage from this file
    return weights


def descend(model: nn.Module, loss: Callable[[], Terms], preset: Preset, progress: float) -> Terms:
    """Leave the gradient of ``loss`` in the parameters, taken at perturbed weights where the preset says so, and return its terms."""
    if preset.sharpness is None or progress < preset.sharpness.after:
        for parameter in model.parameters():
            parameter.grad = None
        terms = loss()
        terms.loss.backward()  # type: ignore[no-untyped-call]
        return terms
    with perturbed(model, lambda: loss().loss.backward(), preset.sharpness):  # type: ignore[no-untyped-call]
        terms = loss()
        terms.loss.backward()  # type: ignore[no-untyped-call]
    return terms


def total_steps(preset: Preset, images: int) -> int:
    """Return how many steps the preset's epochs over so many images are."""
    return math.ceil(preset.epochs * steps_per_epoch(preset, images))


def learning_rate(progress: float, peak: float, schedule: str) -> float:
    """Return the fraction of the top rate: linear up to ``peak`` of the run, then linear or cosine to zero, or constant."""
    if progress < peak:
        return progress / peak
    rest = (1 - progress) / (1 - peak)
    match schedule:
        case "linear":
            return rest
        case "cosine":
            return 0.5 * (1 - math.cos(math.pi * rest))
        case "constant":
            return 1.0
    raise TrainingError(f"schedule must be linear, cosine or constant, not {schedule!r}")


def main() -> None:
    """Run the refresh."""
    from training.refresh import refresh, runs_root

    parser = arguments()
    options = parser.parse_args()
    logs.configure(options.log, "[%(asctime)s] %(message)s", sys.stdout)
    log.setLevel(logging.DEBUG if options.log == "json" else logging.INFO)
    torch.set_num_threads(options.threads)
    clock = Clock(options.max_minutes)
    run = Path()
    try:
        ranks = connect()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        stage = override(chosen(options, device), options.set)
        run = runs_root() / ranks.agree(options.run or default_run(stage, runs_root(), options.resume))
        there = ranks.agree((run / "config.json").is_file())  # one whose data was refused has not begun
        if options.resume and not there:
            raise TrainingError(f"{run} has not begun: leave --resume out to start it")
        if there and trained(run) not in ("", stage.name):
            raise TrainingError(f"{run} is a run of {trained(run)}, not of {stage.name}: another --run starts afresh")
        if there and not options.resume:
            raise TrainingError(f"{run} exists: --resume continues it, another --run starts afresh")
        suite = None if options.only_train else options.suite
        home = refresh(
            stage,
            run,
            init=options.init,
            clock=clock,
            suite=suite,
            device=device,
            ranks=ranks,
            tensorboard=options.tensorboard,
            store=options.store,
            force=options.force,
        )
    except HeldBack as error:
        failed(options, f"{error}\npublish it nevertheless: {again('--force', run)}", HELD_BACK)
    except OutOfTime as error:
        failed(options, f"{error}; give more --max-minutes and go on with: {again('--resume', run)}")
    except EbjdatError as error:
        failed(options, advice(error, parser))
    except OSError as error:  # a full disk: its text names the file
        failed(options, str(error))
    except KeyboardInterrupt:
        failed(options, f"interrupted; go on with: {again('--resume', run)}", 130)
    if ranks.rank:
        return
    if options.only_train:
        logs.announce(options.log, f"trained {home}; export, calibrate, evaluate and publish with: {again('--resume', run)}")
        return
    logs.announce(options.log, f"published {home}\nserve it: make serve MODEL={home.parent}", bundle=str(home))


def failed(options: argparse.Namespace, text: str, status: int = 1) -> NoReturn:
    """Say why nothing was published, in a line for people or a record for machines, and end with ``status``."""
    if options.log == "json":
        log.error("%s", text)
    elif status == 1:
        sys.exit(f"train.py: {text}")
    else:
        print(f"train.py: {text}", file=sys.stderr)
    sys.exit(status)


def trained(run: Path) -> str:
    """Return the preset that a run is of, nothing before it has begun."""
    file = run / "config.json"
    return str(read_json(file)["stages"][-1]["name"]) if file.is_file() else ""


def again(option: str, run: Path) -> str:
    """Return this command as one that goes on with ``run``, training and what comes after it, with ``option``."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--only-train", option)]
    named = [] if not run.name or any(word.split("=")[0] in ("--run", "--name") for word in words) else ["--run", run.name]
    return shlex.join([sys.executable, sys.argv[0], *words, *named, *dict.fromkeys(["--resume", option])])


def arguments() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    parser = parser_of(__doc__, epilog=listing(), formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = sorted({*PRESETS, *METHODS})
    parser.add_argument("preset", nargs="?", choices=choices, metavar="PRESET", help="a preset or a method; the best preset by default")
    parser.add_argument("--data", help=f"for a method: {', '.join(NAMED)}, or a folder of class sub-folders (cifar10)")
    parser.add_argument("--budget", choices=sorted(BUDGETS), help="for a method: network and epochs; by data and device by default")
    # torchrun takes --run for its own --run-path, hence the second name
    parser.add_argument("--run", "--name", help="name of the run under EBJDAT_RUNS; PRESET-DATE-TIME by default")
    parser.add_argument("--resume", action="store_true", help="continue --run, or the newest run of the preset")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors) instead of the warm start")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end training cleanly after so long, and go on with what there is"
    )
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="how much to measure (%(default)s)")
    parser.add_argument("--store", type=Path, help="publish into this store (RUN/store), if the model is not worse than its current one")
    parser.add_argument("--force", action="store_true", help="publish also a model that is worse, or cannot be compared")
    parser.add_argument("--only-train", action="store_true", help="stop when the weights are there; --resume without it does the rest")
    parser.add_argument("--tensorboard", action="store_true", help="also write scalars and samples for TensorBoard (extra [watch])")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="FIELD=VALUE", help="override fields of the preset: lr=0.1 threat.norm=l2"
    )
    parser.add_argument("--log", choices=get_args(logs.Style), default="text", help=logs.STYLE)
    parser.add_argument("--threads", type=int, default=threads(), help="(%(default)s)")
    return parser


def chosen(options: argparse.Namespace, device: torch.device) -> Preset:
    """Return the preset that the command line names; by default the best one for the device."""
    gpu = device.type == "cuda"
    name = options.preset or ("cifar10" if gpu else "cifar10-small")
    if name in PRESETS:
        if options.data or options.budget:
            raise TrainingError(f"{name} says its own data and budget: --data and --budget are for methods, {', '.join(METHODS)}")
        return PRESETS[name]
    budget = options.budget or ("digits" if options.data == "digits" else "large" if gpu else "small")
    return preset(name, budget, options.data)


def default_run(stage: Preset, root: Path, resume: bool) -> str:
    """Return the newest run of the preset to resume, or a new name."""
    if not resume:
        return f"{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    known = [path.parent for path in root.glob("*/config.json") if trained(path.parent) == stage.name]
    if not known:
        raise TrainingError(f"no run of {stage.name} in {root} to resume; leave --resume out, or name it with --run")
    return max(known, key=lambda path: path.stat().st_mtime).name


if __name__ == "__main__":
    main()
