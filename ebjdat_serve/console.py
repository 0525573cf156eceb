"""What every command does with its text and its errors."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebjdat_serve.errors import EbjdatError


@contextmanager
def command(parser: argparse.ArgumentParser, interrupted: str = "interrupted") -> Iterator[None]:
    """Run a command's body: an EbjdatError ends the process with status 1, its text, and the options of ``parser`` that mend it.

    Ctrl-C ends it with the text ``interrupted``.
    """
    try:
        yield
        flush()
    except EbjdatError as error:
        sys.exit(advice(error, parser))
    except BrokenPipeError:
        sys.exit(unread())
    except OSError as error:  # a full disk, a file that may not be read: its text names the file
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(interrupted)


def flush() -> None:
    """Write out what was printed, while a closed pipe or a full disk can still be told; nothing where there is no standard output."""
    if sys.stdout:
        sys.stdout.flush()


def unread() -> int:
    """Return the status, 1, of a command whose reader had enough, as `| head` has; nothing more is said, nor by Python at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def parser_of(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return a command's parser, described by the first line of its module's docstring; from here on any text can be printed."""
    print_anything()
    return argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None, **options)


def print_anything() -> None:
    """Let standard output escape what its encoding lacks, as standard error does: no print may end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def advice(error: EbjdatError, parser: argparse.ArgumentParser) -> str:
    """Return an error's text and, of the options that it names, those that ``parser`` has."""
    return error.advised({name for action in parser._actions for name in action.option_strings})
