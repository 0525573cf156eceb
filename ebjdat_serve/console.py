"""Error handling and output of every command-line program."""

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ebjdat_serve.errors import EbjdatError, visible


@contextmanager
def command(parser: argparse.ArgumentParser, interrupted: str = "interrupted") -> Iterator[None]:
    """Run a command's body: an EbjdatError exits with status 1, its message, and the options of ``parser`` that fix it.

    Ctrl-C exits with the message ``interrupted``.
    """
    try:
        yield
        flush()
    except EbjdatError as error:
        sys.exit(shown(advice(error, parser)))
    except BrokenPipeError:
        sys.exit(unread())
    except OSError as error:  # a full disk, an unreadable file: its message names the file
        sys.exit(shown(str(error)))
    except KeyboardInterrupt:
        sys.exit(interrupted)


def flush() -> None:
    """Flush standard output, if there is one, while a closed pipe or a full disk can still be reported."""
    if sys.stdout:
        sys.stdout.flush()


def unread() -> int:
    """Return status 1 for a closed output pipe, as after `| head`, and silence the interpreter's own error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def parser_of(doc: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return a command's parser, described by the first line of its module's docstring, and make any text printable."""
    print_anything()
    return argparse.ArgumentParser(description=doc.splitlines()[0] if doc else None, **options)


def print_anything() -> None:
    """Let standard output escape characters missing from its encoding, as standard error does: no print may end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shown(text: str) -> str:
    """Return text, of one line or several, that a terminal shows and does not obey: words of strange files may be in it."""
    return "\n".join(map(visible, text.split("\n")))


def advice(error: EbjdatError, parser: argparse.ArgumentParser) -> str:
    """Return an error's message with those of its options that ``parser`` has."""
    return error.advised({name for action in parser._actions for name in action.option_strings})
