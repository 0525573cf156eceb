"""`ebjdat-serve calibrate BUNDLE DIR`, on images; `--scores FILE`, on scores that a server recorded; `--remove NAME` removes such a one."""

import argparse
from pathlib import Path
from typing import Any, get_args

from ebjdat_serve.console import shown
from ebjdat_serve.editing import FORCED
from ebjdat_serve.engines import Precision
from ebjdat_serve.errors import EbjdatError

OF_FOLDER, OF_SCORES = ("folders", "reach_images"), ("name", "since", "until", "precision")


def add(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to ``commands``."""
    parser = commands.add_parser(
        "calibrate", help="calibrate a bundle on the images of a folder, or on recorded scores: p-values, the flag, decisions"
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="images like those to come; sub-folders named as labels tell them"
    )
    parser.add_argument("--folders", type=Path, metavar="FILE", help="JSON object: labels by the names of sub-folders")
    parser.add_argument("--reach-images", type=int, metavar="N", help="images that walk for check=reach (as many as 5 minutes allow)")
    parser.add_argument("--force", action="store_true", help=FORCED)
    scores = parser.add_argument_group("in place of DIR (docs/drift.md)")
    scores.add_argument(
        "--scores",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="audit logs of a server: calibrate on the scores in them, beside the calibration on images",
    )
    scores.add_argument("--name", metavar="NAME", help="of the calibration (traffic)")
    scores.add_argument("--since", metavar="TIME", help="first date or time, UTC, of the period that you vouch for")
    scores.add_argument("--until", metavar="TIME", help="last date, or the time that ends it")
    scores.add_argument("--precision", choices=get_args(Precision), help="that the scores were recorded in (fp32)")
    scores.add_argument("--remove", metavar="NAME", help="remove the calibration NAME of recorded scores, and do nothing else")
    parser.set_defaults(command=calibrate)


def calibrate(options: argparse.Namespace) -> None:
    """Calibrate a bundle, in place or as the next version of its store, or remove a calibration of it."""
    ways = {"DIR": (options.folder, OF_FOLDER, on_images), "--scores": (options.scores, OF_SCORES, on_scores)}
    ways["--remove"] = (options.remove, (), remove)
    given = [way for way, (value, *_) in ways.items() if value is not None]
    if len(given) != 1:
        raise EbjdatError("calibrate takes either DIR, a folder of images, or --scores FILE, audit logs of a server, or --remove NAME")
    _, uses, run = ways[given[0]]
    if strange := [name for name in (*OF_FOLDER, *OF_SCORES) if name not in uses and getattr(options, name) is not None]:
        raise EbjdatError(f"--{strange[0].replace('_', '-')}: calibrate with {given[0]} has no use for it")
    run(options)


def on_images(options: argparse.Namespace) -> None:
    """Calibrate on the images of a folder."""
    from ebjdat_serve.card import renewed
    from ebjdat_serve.editing import edit
    from ebjdat_serve.folder_calibration import calibrate_folder, told
    from ebjdat_serve.folder_images import read_folders

    folders = read_folders(options.folders)
    done = edit(
        options.bundle,
        lambda draft: renewed(calibrate_folder(draft, options.folder, folders=folders, reach_images=options.reach_images)),
        force=options.force,
    )
    print("\n".join([*map(shown, told(done)), f"into {done.path / 'calibration.json'}"]))


def on_scores(options: argparse.Namespace) -> None:
    """Calibrate on scores of audit logs."""
    from ebjdat_serve.audit_rows import bound_of
    from ebjdat_serve.bundle import recorded_file
    from ebjdat_serve.card import renewed
    from ebjdat_serve.editing import edit
    from ebjdat_serve.score_calibration import Choice, calibrate_scores, told

    since = None if options.since is None else bound_of(options.since)
    until = None if options.until is None else bound_of(options.until, end=True)
    if since is not None and until is not None and since >= until:
        raise EbjdatError(
            f"--since {shown(options.since)} is not before the end of --until {shown(options.until)}: no row can be between them"
        )
    name = "traffic" if options.name is None else options.name  # "" is a variable that was not set, and no name
    choice = Choice(options.scores, name, options.precision or "fp32", since, until)
    done = edit(
        options.bundle,
        lambda draft: renewed(calibrate_scores(draft, choice), f"does not tell of {choice.name}"),
        force=options.force,
        renews=(recorded_file(choice.name),),
    )
    print("\n".join([*map(shown, told(done, choice.name)), f"into {done.path / recorded_file(choice.name)}"]))
    print(f"serve it: ebjdat-serve serve {options.bundle} --calibration {choice.name}")


def remove(options: argparse.Namespace) -> None:
    """Remove a calibration of recorded scores."""
    from ebjdat_serve.bundle import recorded_file
    from ebjdat_serve.card import renewed
    from ebjdat_serve.editing import edit
    from ebjdat_serve.score_calibration import without_scores

    done = edit(
        options.bundle,
        lambda draft: renewed(without_scores(draft, options.remove), f"may tell of {options.remove}"),
        force=options.force,
        renews=(recorded_file(options.remove),),
    )
    print(f"the calibration {options.remove} is removed: {done.path}")
