#!/usr/bin/env python3
"""Train a model and publish a bundle: `python training/train.py [PRESET | METHOD]`.

Without arguments it runs the refresh with the best preset for the device:
train -> export -> parity -> calibrate -> evaluate -> gate -> publish. Each step also runs alone, on a bundle.
Any method trains on any data: `train.py trades --data digits`. Several GPUs: `torchrun --nproc-per-node 4 training/train.py …`.
"""

import argparse
import logging
import math
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

import torch

from ebjdat_serve import logs
from ebjdat_serve.console import advice, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.networks import FAMILIES, FOREIGN
from training.config import Preset
from training.data.sources import SOURCES
from training.distributed import connect
from training.errors import HeldBack, OutOfTime, TrainingError
from training.loop.clock import Clock
from training.overrides import listing, override
from training.presets import BUDGETS, METHODS, PRESETS, preset
from training.refresh import configuration, log, refresh, runs_root

HELD_BACK = 3
"""Exit status of a refresh whose model is held back."""


def main() -> None:
    """Train the preset or method named on the command line and publish it."""
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
        stage = override(on_network(chosen(options, device), options.network), options.set)
        run = runs_root() / ranks.agree(options.run or default_run(stage, runs_root(), options.resume))
        there = ranks.agree((run / "config.json").is_file())  # a run whose data was refused has not begun
        if options.resume and not there:
            raise TrainingError(f"{run} has not begun: leave --resume out to start it")
        if there and preset_of(run) not in ("", stage.name):
            raise TrainingError(f"{run} is a run of {preset_of(run)}, not of {stage.name}: another --run starts afresh")
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
        failed(options, f"{error}\npublish it nevertheless: {resuming('--force', run)}", HELD_BACK)
    except OutOfTime as error:
        failed(options, f"{error}; give more --max-minutes and go on with: {again(options, run)}")
    except EbjdatError as error:
        failed(options, advice(error, parser))
    except OSError as error:  # a full disk: its message names the file
        failed(options, str(error))
    except KeyboardInterrupt:
        failed(options, f"interrupted; go on with: {again(options, run)}", 130)
    if ranks.rank:
        return
    if options.only_train:
        logs.announce(options.log, f"trained {home}; export, calibrate, evaluate and publish with: {resuming('--resume', run)}")
        return
    logs.announce(options.log, f"published {home}\nserve it: make serve MODEL={home.parent}", bundle=str(home))


def failed(options: argparse.Namespace, text: str, status: int = 1) -> NoReturn:
    """Exit with ``status`` after reporting why nothing was published, as text or as a JSON record."""
    if options.log == "json":
        log.error("%s", text)
    elif status == 1:
        sys.exit(f"train.py: {text}")
    else:
        print(f"train.py: {text}", file=sys.stderr)
    sys.exit(status)


def preset_of(run: Path) -> str:
    """Return the name of a run's preset, or an empty string before it has begun."""
    return str(configuration(run)["stages"][-1]["name"]) if (run / "config.json").is_file() else ""


def resuming(option: str, run: Path) -> str:
    """Return the command that continues ``run`` up to its publication, with ``option``."""
    words = [word for word in sys.argv[1:] if word not in ("--resume", "--only-train", option)]
    named = [] if not run.name or any(word.split("=")[0] in ("--run", "--name") for word in words) else ["--run", run.name]
    return shlex.join([sys.executable, sys.argv[0], *words, *named, *dict.fromkeys(["--resume", option])])


def again(options: argparse.Namespace, run: Path) -> str:
    """Return the command that goes on with what was asked for: --only-train trains on a machine that can do no more."""
    return resuming("--resume", run) + (" --only-train" if options.only_train else "")


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = parser_of(
        __doc__,
        epilog=listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # gpu_train.sh reads options by their whole names
    )
    choices = sorted({*PRESETS, *METHODS})
    parser.add_argument("preset", nargs="?", choices=choices, metavar="PRESET", help="a preset or a method; the best preset by default")
    parser.add_argument("--data", help=f"for a method: {', '.join(SOURCES)}, or a folder of class sub-folders (cifar10)")
    parser.add_argument("--budget", choices=sorted(BUDGETS), help="for a method: network and epochs; by data and device by default")
    parser.add_argument(
        "--network",
        choices=sorted(name for name, kind in FAMILIES.items() if kind not in FOREIGN),
        help="family of networks, at its own default sizes; the budget's by default",
    )
    # torchrun parses --run as its own --run-path, hence the second name
    parser.add_argument("--run", "--name", help="name of the run under EBJDAT_RUNS; PRESET-DATE-TIME by default")
    parser.add_argument("--resume", action="store_true", help="continue --run, or the newest run of the preset")
    parser.add_argument("--init", type=Path, help="start from these weights (safetensors) instead of the warm start")
    parser.add_argument(
        "--max-minutes", type=float, default=math.inf, help="end training cleanly after this time and continue with the current weights"
    )
    parser.add_argument("--suite", choices=("quick", "full"), default="quick", help="amount of evaluation (%(default)s)")
    parser.add_argument("--store", type=Path, help="publish into this store (RUN/store), if the model is not worse than its current one")
    parser.add_argument("--force", action="store_true", help="publish even a model that is worse or cannot be compared")
    parser.add_argument("--only-train", action="store_true", help="stop after training; --resume without it does the rest")
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
            raise TrainingError(f"{name} sets its own data and budget: --data and --budget are for methods, {', '.join(METHODS)}")
        return PRESETS[name]
    usual = SOURCES[options.data].budget if options.data in SOURCES else None
    budget = options.budget or usual or ("large" if gpu else "small")
    return preset(name, budget, options.data)


def on_network(stage: Preset, family: str | None) -> Preset:
    """Return the preset on a network of another family, with that family's default sizes."""
    return replace(stage, architecture=FAMILIES[family]()) if family else stage


def default_run(stage: Preset, root: Path, resume: bool) -> str:
    """Return the newest run of the preset to resume, or a new name."""
    if not resume:
        return f"{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    known = [path.parent for path in root.glob("*/config.json") if preset_of(path.parent) == stage.name]
    if not known:
        raise TrainingError(f"no run of {stage.name} in {root} to resume; leave --resume out, or name it with --run")
    return max(known, key=lambda path: path.stat().st_mtime).name


if __name__ == "__main__":
    main()
