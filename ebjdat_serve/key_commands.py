"""`ebjdat-serve key new | list | revoke`."""

import argparse
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebjdat_serve import keys
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.server.settings import SETTINGS

FILE_VARIABLE = next(one.variable for one in SETTINGS if one.name == "keys")
"""The key file of `ebjdat-serve serve` and `ebjdat-serve key` where none is given."""


def add(commands: Any) -> None:
    """Add `key` and its three commands to the subparsers ``commands``."""
    key = commands.add_parser("key", help="make, list and revoke the API keys of a key file")
    key.set_defaults(parser=key)
    actions = key.add_subparsers(required=True, metavar="{new,list,revoke}")

    new_parser = _action(actions, "new", new, "add a key and print it, once: the file holds its sha256 alone")
    new_parser.add_argument("name", help="who uses it: letters, digits and ._-; logs name it")
    new_parser.add_argument(
        "--scope",
        action="append",
        choices=keys.SCOPES,
        help="what it may do; may be repeated (classify and generate; explain: adversarial images; operate: exact energies, load, metrics)",
    )
    new_parser.add_argument("--rate", type=float, metavar="REQUESTS", help="requests per second (the server's limit per client)")
    new_parser.add_argument("--burst", type=int, metavar="REQUESTS", help="requests at once after a pause (the server's)")
    new_parser.add_argument("--concurrency", type=int, metavar="REQUESTS", help="requests under way (the server's)")
    new_parser.add_argument("--days", type=float, help="days after which it expires (never)")

    _action(actions, "list", list_keys, "print the keys of a file: names, scopes, limits, dates")
    _action(actions, "revoke", revoke, "remove a key; running servers refuse it within two seconds").add_argument("name")


def _action(actions: Any, name: str, command: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=text)
    default = os.environ.get(FILE_VARIABLE)
    parser.add_argument("--file", type=Path, default=default, required=default is None, help=f"the key file (${FILE_VARIABLE})")
    parser.set_defaults(command=command, parser=parser)
    return parser


def new(options: argparse.Namespace) -> None:
    """Print a new key on standard output, and where it went on standard error."""
    created = datetime.now(UTC).replace(microsecond=0)
    try:
        key = keys.Key(
            name=options.name,
            sha256="0" * 64,
            scopes=frozenset(options.scope or ("classify", "generate")),
            rate=options.rate,
            burst=options.burst,
            concurrency=options.concurrency,
            created=created,
            expires=None if options.days is None else created + timedelta(days=options.days),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise EbjdatError(f"{first['loc'][0]} {first['input']!r}: {first['msg']}") from None
    except (OverflowError, ValueError) as error:
        raise EbjdatError(f"days {options.days}: {error}") from None
    secret = keys.new(options.file, key)
    print(secret)
    print(f"key {key.name} is in {options.file}; it is shown this once: send it as X-API-Key", file=sys.stderr)


def list_keys(options: argparse.Namespace) -> None:
    """Print the keys of a file as a table."""
    rows: list[tuple[str, ...]] = [("name", "scopes", "rate", "burst", "concurrency", "created", "expires", "sha256")]
    now = datetime.now(UTC)
    for key in keys.parse(keys.read(options.file)[0], options.file):
        expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d}{' (over)' if key.expired(now) else ''}"
        limits = ("-" if value is None else f"{value:g}" for value in (key.rate, key.burst, key.concurrency))
        rows.append((key.name, ",".join(sorted(key.scopes)), *limits, f"{key.created:%Y-%m-%d}", expires, key.sha256[:12]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def revoke(options: argparse.Namespace) -> None:
    """Remove a key from a file."""
    keys.revoke(options.file, options.name)
    print(f"key {options.name} is revoked")
