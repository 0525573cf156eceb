"""Scores in a server's audit log: the rows of one bundle in a period, each picture once. Lines may be anybody's: they are data, bounded."""

import hashlib
import os
import re
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any, BinaryIO

from ebjdat_serve import strict_json
from ebjdat_serve.bounds import NATS
from ebjdat_serve.errors import EbjdatError, cause, first_line
from ebjdat_serve.listing import printable
from ebjdat_serve.manifest import Source

LONGEST_LINE = 2**16
"""Bytes of a line; a server writes some 700."""
MOST_ROWS = 4_000_000
"""Pictures that are told from each other at most, by 16 bytes of their sha256: some 600 MB."""
MOST_KEYS, OTHERS = 10_000, "others"
"""Names of API keys that are told from each other at most, and what the others count as."""
BEGINNING = b'{"time":'
"""What a server begins a row with; within a row no string can hold it, whose quotes are escaped."""
UNFINISHED = "torn: the last line of a file that is still written"
TORN = "torn: a server that was killed began them, and the next one went on in the same line"


@dataclass(frozen=True)
class Wanted:
    """Which rows are wanted: scores by ``scored_by`` (sha256), in a precision, from ``since`` on and before ``until``."""

    scored_by: str
    precision: str
    since: datetime | None = None
    until: datetime | None = None


@dataclass
class Recorded:
    """What was read: scores and margins of N pictures in the order of the rows, and why other rows are not among them."""

    scores: "array[float]" = field(default_factory=lambda: array("d"))
    margins: "array[float]" = field(default_factory=lambda: array("d"))
    first: datetime | None = None
    last: datetime | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)  # pictures by the name of the API key, "" for none, OTHERS beyond MOST_KEYS
    sources: list[Source] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)

    def take(self, row: dict[str, Any], wanted: Wanted) -> None:
        """Add a row, or count why it is not wanted; raise ValueError for one of this bundle that no server wrote."""
        when = instant(row.get("time"))
        if reason := unwanted(row, when, wanted):
            self.skipped[reason] += 1
            return
        digest, values = row.get("sha256"), [row.get(name) for name in ("suspicion", "margin")]
        if type(digest) is not str or len(digest) != 64 or len(whole := bytes.fromhex(digest)) != 32:  # it skips blanks
            raise ValueError("sha256 must have 64 hexadecimal digits")
        picture = whole[:16]
        if None in values:
            self.skipped["of scores that are not finite"] += 1
            return
        numbers = [number(value) for value in values]
        if picture in self.seen:
            self.skipped["of a picture that was sent before"] += 1
            return
        if len(self.seen) >= MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS:,} pictures: choose a shorter period by --since and --until")
        self.seen.add(picture)
        for column, value in zip((self.scores, self.margins), numbers, strict=True):
            column.append(value)
        self.first, self.last = min(self.first or when, when), max(self.last or when, when)
        key = str(row.get("key", ""))[:100]
        self.keys[key if key in self.keys or len(self.keys) < MOST_KEYS else OTHERS] += 1


def unwanted(row: dict[str, Any], when: datetime, wanted: Wanted) -> str:
    """Return why a row is not wanted, "" if it is."""
    if (wanted.since and when < wanted.since) or (wanted.until and when >= wanted.until):
        return "outside the period"
    if row.get("sha256_scores") is None:
        return "without sha256_scores: of an earlier server, or a model that is not calibrated"
    if row["sha256_scores"] != wanted.scored_by:
        precision = row.get("precision")
        return "of another precision" if precision != wanted.precision else "of another model, graph or views"
    return ""


def instant(text: Any) -> datetime:
    """Return a row's time; raise ValueError for none with a zone."""
    if type(text) is not str or len(text) > 40 or (found := datetime.fromisoformat(text)).tzinfo is None:
        raise ValueError("time must be of ISO 8601, with a zone")
    return found.astimezone(UTC)


def number(value: Any) -> float:
    """Return a score as a server computed it; raise ValueError for what is no number, or beyond what a bundle may hold."""
    if type(value) not in (int, float):
        raise ValueError(f"{str(value)[:40]!r} is no score")
    if fault := NATS.fault(value):
        raise ValueError(f"a score {fault}")
    return float(value)


def read_rows(files: Sequence[Path], wanted: Wanted) -> Recorded:
    """Return what audit logs say of one bundle; raise EbjdatError naming the file and line that no server wrote.

    The last line of a file may be torn, since a server is still writing it, and any may begin with what a killed one left.
    """
    found = Recorded()
    for file in files:
        try:
            with open(file, "rb") as stream:
                read_file(stream, file, wanted, found)
        except OSError as error:
            raise EbjdatError(f"{printable(str(file))} cannot be read: {cause(error)}") from error
    return found


def read_file(stream: BinaryIO, file: Path, wanted: Wanted, found: Recorded) -> None:
    """Add the rows of one file to ``found``."""
    hashed, count, now = hashlib.sha256(), 0, os.fstat(stream.fileno())
    left = now.st_size if stat.S_ISREG(now.st_mode) else 2**62  # of a log, what is written meanwhile is not read; a pipe has no size
    for count, line in enumerate(bounded(stream, left), 1):
        hashed.update(line)
        try:
            if len(line) > LONGEST_LINE:
                raise ValueError(f"it is longer than {LONGEST_LINE:,} bytes")
            rows, torn = parsed(line)
            found.skipped.update(torn)
            for row in rows:
                found.take(row, wanted)
        except (ValueError, RecursionError, OverflowError) as error:
            raise EbjdatError(f"{printable(str(file))}, line {count}, is no row of an audit log: {first_line(error)}") from error
    found.sources.append(Source(printable(file.name), hashed.hexdigest(), count))


def bounded(stream: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the lines in the first ``size`` bytes, of longer ones the first LONGEST_LINE + 1 bytes, after which nothing follows."""
    while size > 0 and (line := stream.readline(min(size, LONGEST_LINE + 1))):
        size -= len(line)
        yield line


def parsed(line: bytes) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the objects of a line, one but where a killed server left its own without an end, and why parts of it are none.

    Raises ValueError for a line that ends in none.
    """
    try:
        return [object_of(line)], []
    except ValueError:
        pieces = re.split(b"(?<=.)(?=%b)" % re.escape(BEGINNING), line, flags=re.DOTALL) if line.startswith(b"{") else [line]
    rows, torn = [], []
    for piece in pieces[:-1]:
        try:
            rows.append(object_of(piece))
        except ValueError:
            torn.append(TORN)
    try:
        rows.append(object_of(pieces[-1]))
    except ValueError:
        if line.endswith(b"\n"):
            raise
        torn.append(UNFINISHED)
    return rows, torn


def object_of(text: bytes) -> dict[str, Any]:
    """Return a JSON object; raise ValueError for anything else."""
    found = strict_json.loads(text, unique=True)
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    return found


def bound_of(text: str, *, end: bool = False) -> datetime:
    """Return the instant of --since or --until, UTC where it names no zone; with ``end`` a date means the end of its day.

    Raises EbjdatError for what is no date and no time.
    """
    try:
        if len(text) == len("2026-11-27"):
            day = datetime.combine(date.fromisoformat(text), time(), UTC)
            return day + timedelta(days=end)
        found = datetime.fromisoformat(text)
        return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        raise EbjdatError(f"{printable(text[:40])!r} is no date, as 2026-11-27, and no time, as 2026-11-27T18:00") from None
