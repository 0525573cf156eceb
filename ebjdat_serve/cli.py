"""The command line: `ebjdat-serve serve`, `import`, `inspect` and the rest, which `ebjdat-serve --help` lists."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from ebjdat_serve import __version__, logs
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.console import advice, flush, parser_of, shown, unread
from ebjdat_serve.engines import Device, EngineKind, Precision
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.install import install
from ebjdat_serve.keys import KEY_VARIABLE
from ebjdat_serve.verification import Terms

log = logging.getLogger("ebjdat_serve")
SERVE_USAGE = "ebjdat-serve serve [OPTIONS] [MODEL [[NAME=]MODEL ...]]"
SERVE_EPILOG = "Each option has an environment variable, EBJDAT_ and its name: EBJDAT_PORT for --port. An option wins over its variable."
ALLOW_OLDER = "also a version older than what the store's servers served last under serve --trust"

OPEN = (
    "whoever can reach this server can use it, and gets exact energies and p-values, which help an attacker: give it --keys FILE "
    "(ebjdat-serve key new), or serve --profile public (docs/security.md)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 with the error on stderr."""
    parser = parser_of("Serve, inspect, verify, publish and sign EB-JDAT model bundles.", prog="ebjdat-serve")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True)

    from ebjdat_serve import calibrate_command, import_command, key_commands
    from ebjdat_serve.editing import FORCED
    from ebjdat_serve.server.settings import SHIPPED, VERIFIED_BY, add_arguments
    from ebjdat_serve.sgld import NOISE, STEPS

    def on_folder(name: str, command: Callable[[argparse.Namespace], None], text: str, images: str) -> argparse.ArgumentParser:
        """Add a command that measures a bundle on the images of a folder, and writes what it finds into it."""
        sub = commands.add_parser(name, help=text)
        sub.add_argument("bundle", type=Path)
        sub.add_argument("folder", type=Path, metavar="DIR", help=images)
        sub.add_argument("--folders", type=Path, metavar="FILE", help="JSON object: labels by the names of sub-folders")
        sub.add_argument("--force", action="store_true", help=FORCED)
        sub.set_defaults(command=command)
        return sub

    serve_parser = commands.add_parser("serve", help="serve bundles, or stores of them, over HTTP", usage=SERVE_USAGE, epilog=SERVE_EPILOG)
    add_arguments(serve_parser)
    serve_parser.set_defaults(command=serve)

    for name, command, text in (
        ("inspect", inspect, "print a summary of a bundle"),
        ("verify", verify, "check hashes and replay the self-test"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("model", nargs="?", type=Path, default=SHIPPED)
        sub.set_defaults(command=command)
    verify_parser = commands.choices["verify"]
    verify_parser.add_argument("--engine", default="auto", choices=get_args(EngineKind))
    verify_parser.add_argument("--device", default="cpu", choices=get_args(Device))
    verify_parser.add_argument("--precision", default="fp32", choices=get_args(Precision))

    list_parser = commands.add_parser("list", help="print a store's versions, and its candidates with the reason each was held back")
    list_parser.add_argument("store", type=Path)
    list_parser.set_defaults(command=list_store)
    publish_parser = commands.add_parser("publish", help="copy a bundle into a store and point the store at it")
    publish_parser.add_argument("bundle", type=Path)
    publish_parser.add_argument("store", type=Path)
    publish_parser.add_argument("--key", type=Path, help="private key to sign the bundle with")
    publish_parser.add_argument("--force", action="store_true", help="publish even a candidate that a refresh held back")
    publish_parser.add_argument("--allow-older", action="store_true", help=ALLOW_OLDER)
    publish_parser.set_defaults(command=publish)
    rollback_parser = commands.add_parser("rollback", help="point a store at its previous version, or at a named one")
    rollback_parser.add_argument("store", type=Path)
    rollback_parser.add_argument("version", nargs="?", default="")
    rollback_parser.add_argument("--allow-older", action="store_true", help=ALLOW_OLDER)
    rollback_parser.set_defaults(command=rollback)
    sign_parser = commands.add_parser("sign", help="sign a bundle's manifest with an ed25519 key")
    sign_parser.add_argument("bundle", type=Path)
    sign_parser.add_argument("--key", type=Path, required=True)
    sign_parser.set_defaults(command=sign)
    upgrade_parser = commands.add_parser("upgrade", help="convert a bundle that an earlier version wrote, in a new folder")
    upgrade_parser.add_argument("old", type=Path, help="a bundle of schema 1, or a store")
    upgrade_parser.add_argument("new", type=Path, help="a folder that does not exist yet")
    upgrade_parser.set_defaults(command=upgrade)
    calibrate_command.add(commands)
    prior_parser = on_folder(
        "prior",
        prior,
        "fit class Gaussians to a folder, where drawing starts, and measure class agreement",
        "images in sub-folders named as labels, 10 of a class at least",
    )
    prior_parser.add_argument("--steps", type=int, metavar="N", default=STEPS, help=f"Langevin steps ({STEPS})")
    prior_parser.add_argument("--step-size", type=float, metavar="X", help="pixels of [0,1] by unit of score (by the score at the prior)")
    prior_parser.add_argument("--grad-clip", type=float, metavar="X", help="bound on each component of the score (half a pixel a step)")
    prior_parser.add_argument("--noise-std", type=float, metavar="X", default=NOISE, help=f"noise of a step, pixels of [0,1] ({NOISE})")
    prior_parser.add_argument("--chains", type=int, metavar="N", help="chains that agreement is measured on (as many as 5 minutes allow)")
    quantize_parser = on_folder(
        "quantize",
        quantize,
        "add int8 to an imported bundle, measured on images that are held back",
        "300 images or more like those to come; sub-folders named as labels tell them",
    )
    quantize_parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, admitted or not")
    for sub in (publish_parser, rollback_parser, sign_parser):
        add_arguments(sub, VERIFIED_BY)
    import_command.add(commands)
    key_commands.add(commands)

    for sub in commands.choices.values():
        sub.set_defaults(parser=sub)
    options = parser.parse_args(arguments)
    try:
        options.command(options)
        flush()
    except KeyboardInterrupt:
        print("ebjdat-serve: interrupted", file=sys.stderr)
        return 130
    except (EbjdatError, OSError) as error:
        if isinstance(error, BrokenPipeError) and options.command is not serve:
            return unread()
        text = shown(advice(error, options.parser) if isinstance(error, EbjdatError) else str(error))
        if getattr(options, "log", "text") == "json":
            log.error("%s", text)
        else:
            print(f"ebjdat-serve: {text}", file=sys.stderr)
        return 2
    return 0


def serve(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    from ebjdat_serve.server import litserve_adapter
    from ebjdat_serve.server.app import build_server
    from ebjdat_serve.server.line_log import log_by_thread
    from ebjdat_serve.server.settings import settings_of

    settings = settings_of(options, os.environ)
    if settings.host == "localhost":
        settings = replace(settings, host="127.0.0.1")  # LitServe takes addresses only
    options.log = settings.log  # main() reports errors there
    logs.configure(settings.log)
    litserve_adapter.check_address(settings.host, settings.port)
    if settings.exposed and settings.profile == "full" and not (settings.keys or os.environ.get(KEY_VARIABLE)):
        log.warning("%s", OPEN)
    logs.announce(settings.log, f"starting {settings.model}")
    if settings.stock:
        if settings.log == "json":
            raise EbjdatError("--stock logs as LitServe does: leave out --log json, or --stock")
        if settings.profile == "public":
            raise EbjdatError("--stock answers everything that the model says: leave out --profile public, or --stock")
        if settings.audit_log or settings.drift_state or settings.access_log:
            raise EbjdatError("--stock writes none of --access-log, --audit-log and --drift-state: leave them out, or --stock")
        if settings.more:
            raise EbjdatError("--stock serves one model: name one, or leave out --stock")
        if settings.check == "reach":
            raise EbjdatError("--stock checks no label's reach: leave out --check reach, or --stock")
        from ebjdat_serve.server import stock

        stock.run(settings)
        return
    server, models = build_server(settings)
    url = f"http://{'localhost' if settings.host == '::' else settings.host}:{settings.port}"

    def greet() -> None:
        logs.announce(settings.log, f"{models()} on {url} (docs: {url}/docs); Ctrl-C ends", model=models(), url=url)

    log_by_thread()
    litserve_adapter.run(server, settings, greet)


def terms(options: argparse.Namespace) -> Terms:
    """Return how servers are to serve a bundle: by the options of `serve` that decide whether they accept it, and their variables."""
    from ebjdat_serve.server.settings import VERIFIED_BY, settings_of

    settings = settings_of(options, os.environ, VERIFIED_BY)
    return settings.terms(settings.trusted())


def publish(options: argparse.Namespace) -> None:
    """Publish a bundle; servers of the store load it without a restart."""
    from ebjdat_serve import store

    bundle = Bundle.draft(options.bundle)
    home = store.publish(bundle, options.store, options.key, force=options.force, terms=terms(options), allow_older=options.allow_older)
    print(f"{home} is current")


def list_store(options: argparse.Namespace) -> None:
    """Print a store's versions and candidates."""
    from ebjdat_serve import store

    print(store.listing(options.store))


def rollback(options: argparse.Namespace) -> None:
    """Point a store at an earlier version."""
    from ebjdat_serve import store

    home = store.rollback(options.store, options.version, terms=terms(options), allow_older=options.allow_older)
    print(f"{home} is current")


def sign(options: argparse.Namespace) -> None:
    """Sign a bundle that a server would accept."""
    from ebjdat_serve import store

    print(f"signed: {store.sign(options.bundle, options.key, terms(options))}")


def upgrade(options: argparse.Namespace) -> None:
    """Convert a bundle of an earlier schema."""
    from ebjdat_serve.engines import check_onnxruntime

    check_onnxruntime()
    from ebjdat_serve.upgrade import upgrade

    done = upgrade(options.old, options.new)
    print(f"{done.path} is {done.manifest.name}@{done.manifest.version}, schema {done.manifest.schema}")
    calibration = done.calibration()
    for name, why in calibration.left_out.items():
        print(shown(f"without the view {name}: {why.replace('BUNDLE', str(done.path))}"))


def prior(options: argparse.Namespace) -> None:
    """Fit a bundle's prior to a folder, in place or as the next version of its store."""
    from ebjdat_serve.card import renewed
    from ebjdat_serve.editing import edit
    from ebjdat_serve.folder_images import read_folders
    from ebjdat_serve.folder_prior import Wanted, prior_folder, told

    folders, o = read_folders(options.folders), options
    wanted = Wanted(o.steps, o.step_size, o.grad_clip, o.noise_std, o.chains)
    done = edit(o.bundle, lambda draft: renewed(prior_folder(draft, o.folder, folders=folders, wanted=wanted)), force=o.force)
    print("\n".join([*told(done), f"into {done.path / 'prior.safetensors'}"]))


def quantize(options: argparse.Namespace) -> None:
    """Add int8 to an imported bundle, in place or as the next version of its store."""
    if find_spec("onnx") is None or find_spec("torch") is None:
        raise EbjdatError(f"quantize needs packages that serving does not: {install('import')}")
    from ebjdat_serve.engines import check_onnxruntime

    check_onnxruntime()
    from ebjdat_serve.folder_images import read_folders
    from ebjdat_serve.folder_quantization import quantize_folder

    folders = read_folders(options.folders)
    done = quantize_folder(options.bundle, options.folder, folders=folders, json=options.json, force=options.force)
    print(f"int8 admitted to {done.path}, now {done.manifest.version}; serve it: ebjdat-serve serve {done.path} --precision int8")


def inspect(options: argparse.Namespace) -> None:
    """Print a bundle's manifest, provenance and figures."""
    from ebjdat_serve.card import summary

    print(summary(Bundle.load(options.model)))


def verify(options: argparse.Namespace) -> None:
    """Check all that a server would: every hash, then the self-test through the engine."""
    from ebjdat_serve.selftest import FUNCTIONS
    from ebjdat_serve.verification import verified

    found = verified(options.model, Terms(options.engine, options.device, options.precision), FUNCTIONS)
    print(f"{found.bundle.path}: {len(found.bundle.manifest.files)} files match their sha256")
    assert found.opened
    for name, worst in found.opened.errors.items():
        print(f"self-test {name}: largest difference {worst:.1e} of the largest value")
    print("ok")


if __name__ == "__main__":
    sys.exit(main())
