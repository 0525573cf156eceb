"""Logging configuration: text for people, or one JSON object per line for machines (`--log json`)."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from ebjdat_serve.console import shown

Style = Literal["text", "json"]
STYLE = "text for people, or json: every line of standard output is one JSON object (%(default)s)"
"""The help of --log."""
LIBRARIES = ("litserve", "uvicorn", "uvicorn.error", "uvicorn.access", "py.warnings")
"""Loggers that bring handlers of their own."""


def now() -> str:
    """Return the time, UTC, as logs have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class TextLines(logging.Formatter):
    """A record in a format for people, whatever words of strange files are in it: a terminal shows it and does not obey it."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


class JsonLines(logging.Formatter):
    """A record as a JSON object: time (UTC), level, logger, message, extra fields, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        row: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            row["traceback"] = self.formatException(record.exc_info)
        return json.dumps(row, default=str)


def configure(style: Style, text: str = "%(levelname)s: %(message)s", stream: TextIO | None = None) -> None:
    """Write this process's log as JSON to standard output, or in the format ``text`` to ``stream`` (standard error)."""
    handler = logging.StreamHandler(sys.stdout if style == "json" else stream or sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines(text, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(style == "json")
    logging.getLogger("ebjdat_serve").setLevel(logging.INFO if style == "json" else logging.WARNING)
    adopt()


def adopt() -> None:
    """Redirect libraries that configure their own log handlers to ours."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def announce(style: Style, text: str, **fields: object) -> None:
    """Print ``text`` on standard output, or log it as JSON with ``fields``."""
    if style == "text":
        print(text, flush=True)
    else:
        logging.getLogger("ebjdat_serve").info("%s", text, extra={"fields": fields})
