"""API keys: a JSON file of named keys, of which it holds the sha256 alone, and LIT_SERVER_API_KEY for one key.

    {"schema": 1, "keys": [{"name": "shop", "sha256": "…", "scopes": ["classify"], "rate": 20, "created": "2026-11-26T08:00:00Z"}]}

A key of ours has 256 random bits, so its sha256 cannot be searched for: a slow hash would protect nothing, and would let anybody who
sends wrong keys occupy the CPU. docs/decisions/0021-keys.md.
"""

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ebjdat_serve.atomic import replacing
from ebjdat_serve.errors import EbjdatError, cause
from ebjdat_serve.locking import exclusive_lock

log = logging.getLogger("ebjdat_serve")
Scope = Literal["classify", "generate", "explain", "operate"]
SCOPES: tuple[Scope, ...] = ("classify", "generate", "explain", "operate")
KEY_VARIABLE = "LIT_SERVER_API_KEY"
PREFIX = "ebjdat_"
"""What our keys begin with, so that scanners of repositories and logs can find one that was lost."""
LONGEST = 4096
"""Characters of a key: with its header's name it fits into the 8 KiB that proxies allow a header."""
GUESSABLE = 20
"""Characters below which a key from the environment is called short."""
MOST_KEYS, LARGEST_FILE = 1000, 2**20
UNSETTLED = 2.0
"""Seconds after its last change in which a file is read again even if it looks the same: a clock of files may tick slowly."""


class Key(BaseModel):
    """One key: who it is, what it may do and how much; None leaves a limit to the server's default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)]
    rate: Annotated[float, Field(gt=0, le=1e6)] | None = None  # requests per second
    burst: Annotated[int, Field(ge=1, le=10**6)] | None = None  # requests at once
    concurrency: Annotated[int, Field(ge=1, le=10**6)] | None = None  # requests under way
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def expired(self, now: datetime) -> bool:
        """Return whether the key's time is over."""
        return self.expires is not None and now >= self.expires


class Document(BaseModel):
    """The key file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_: Annotated[Literal[1], Field(alias="schema")]
    keys: Annotated[tuple[Key, ...], Field(max_length=MOST_KEYS)]

    @model_validator(mode="after")
    def distinct(self) -> Self:
        """Refuse two keys of one name, or of one hash."""
        for field in ("name", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                if getattr(key, field) in seen or (field == "name" and key.name == KEY_VARIABLE):
                    raise ValueError(f"the {field} of key {key.name} is taken")
                seen.add(getattr(key, field))
        return self


FIELDS = tuple(Key.model_fields)


def digest(key: str | bytes) -> str:
    """Return what a key file holds of ``key``."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()


def environment_key() -> Key | None:
    """Return LIT_SERVER_API_KEY as a key of all scopes, None if it is not set; a short one is warned of in the log.

    White space at its ends, as a file of secrets has, is no part of it. Raises EbjdatError for a key that no client could send, and for a
    blank one: the server would be open.
    """
    text = os.environ.get(KEY_VARIABLE)
    if text is None:
        return None
    key = text.strip()
    if not key:
        raise EbjdatError(f"{KEY_VARIABLE} is set and holds no key: give one, or unset it to serve without")
    if not key.isascii() or not key.isprintable():
        raise EbjdatError(f"{KEY_VARIABLE} has characters that are not printable ASCII, which no header can carry: choose another key")
    if len(key) > LONGEST:
        raise EbjdatError(
            f"{KEY_VARIABLE} has {len(key)} characters, more than the {LONGEST} that fit into a header: is it the right secret?"
        )
    if len(key) < GUESSABLE:
        log.warning("%s has %d characters and can be guessed: use %d random ones or more", KEY_VARIABLE, len(key), GUESSABLE)
    return Key(name=KEY_VARIABLE, sha256=digest(key), scopes=frozenset(SCOPES), created=datetime.now(UTC))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError("a field is given twice")
    return dict(pairs)


def parse(content: bytes, file: Path) -> tuple[Key, ...]:
    """Return the keys in ``content``; raise EbjdatError that names ``file`` and the field, and repeats no value: it may be a key."""
    try:
        json.loads(content, object_pairs_hook=_unique)  # pydantic would take the last of two
        return Document.model_validate_json(content).keys
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part)[:40] for part in first["loc"])
        what = (
            f"unknown field; known are {', '.join(FIELDS)}"
            if first["type"] == "extra_forbidden"
            else first["msg"].removeprefix("Value error, ")
        )
        raise EbjdatError(f"{file}: {place + ': ' if place else ''}{what}") from None
    except (ValueError, RecursionError) as error:
        raise EbjdatError(f"{file} is not a key file: {error}") from None


def read(file: Path) -> tuple[bytes, os.stat_result]:
    """Return a key file's content and status; raise EbjdatError if it cannot be read, is too large, or anybody may write it."""
    try:
        # O_NONBLOCK: to open a pipe would wait for a writer, and the key file would be followed no more
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise EbjdatError(f"{file} is not a file")
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise EbjdatError(f"{file} cannot be read: {cause(error)}") from None
    if len(content) > LARGEST_FILE:
        raise EbjdatError(f"{file} is larger than {LARGEST_FILE} bytes")
    if status.st_mode & stat.S_IWOTH:
        raise EbjdatError(f"{file} may be written by anybody, who could add a key: chmod 600 {file}")
    return content, status


def write(file: Path, keys: tuple[Key, ...]) -> None:
    """Replace a key file, or the file that a link means, by one that its owner alone may read, or who could before.

    Raises EbjdatError if the file belongs to another user, to whom it cannot be given back: a server of that user could not read it.
    """
    target = Path(os.path.realpath(file))
    rows = [key.model_dump(mode="json", exclude_none=True) | {"scopes": sorted(key.scopes)} for key in keys]
    with (
        replacing(target) as aside,
        os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream,
    ):
        if target.exists():
            before = target.stat()
            os.fchmod(stream.fileno(), stat.S_IMODE(before.st_mode))
            try:
                os.fchown(stream.fileno(), before.st_uid, before.st_gid)
            except PermissionError:
                raise EbjdatError(f"{file} belongs to user {before.st_uid}, group {before.st_gid}; edit it as that user") from None
        stream.write(json.dumps({"schema": 1, "keys": rows}, indent=1) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def edited(file: Path) -> Iterator[dict[str, Key]]:
    """Yield the keys of ``file`` by name, none where it is missing, and write them back; one process at a time."""
    target = Path(os.path.realpath(file))
    with exclusive_lock(target.with_name(f".{target.name}.lock")):
        keys = {key.name: key for key in parse(read(target)[0], file)} if target.exists() else {}
        yield keys
        if len(keys) > MOST_KEYS:
            raise EbjdatError(f"{file} holds {MOST_KEYS} keys, and can hold no more: revoke some")
        write(target, tuple(keys.values()))


def new(file: Path, key: Key) -> str:
    """Add ``key`` to ``file``, which is made if it is missing, under a new secret; return the secret, which is kept nowhere.

    Raises EbjdatError if the name is taken.
    """
    secret = PREFIX + secrets.token_urlsafe(32)
    with edited(file) as keys:
        if key.name in keys or key.name == KEY_VARIABLE:
            raise EbjdatError(f"{file} has a key {key.name} already: revoke it first, or choose another name")
        keys[key.name] = key.model_copy(update={"sha256": digest(secret)})
    return secret


def revoke(file: Path, name: str) -> None:
    """Remove a key; running servers refuse it within about two seconds. Raises EbjdatError if there is none of that name."""
    if not file.exists():
        raise EbjdatError(f"{file} does not exist")
    with edited(file) as keys:
        if keys.pop(name, None) is None:
            raise EbjdatError(f"{file} has no key {name}; it has {', '.join(keys) or 'none'}")


@dataclass(frozen=True)
class Reading:
    """What a look at a key file found: its keys, None while it looks as it did; or why it could not be read."""

    keys: tuple[Key, ...] | None = None
    signature: tuple[int, ...] | None = None  # of the file that need not be read again
    error: str = ""


class KeyRing:
    """The keys a server takes: those of a file, which is read again when it changes, and the environment's."""

    def __init__(
        self,
        file: Path | None,
        environment: Key | None = None,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Read ``file``; raise EbjdatError if it is missing or wrong."""
        self.file, self._environment, self._now = file, environment, now
        self._keys: tuple[Key, ...] = ()
        self._signature: tuple[int, ...] | None = None
        self._said = ""
        if file:
            reading = self.read_again()
            if reading.error:
                raise EbjdatError(reading.error)
            self._keys, self._signature = reading.keys or (), reading.signature
            if (mode := file.stat().st_mode) & (stat.S_IROTH | stat.S_IWGRP):
                log.warning("%s may be read by others or written by its group (mode %o): chmod 600 %s", file, stat.S_IMODE(mode), file)

    @property
    def closed(self) -> bool:
        """Whether requests need a key: a file closes a server even while no key is left in it."""
        return self.file is not None or self._environment is not None

    def find(self, sent: bytes) -> Key | None:
        """Return the key that a client sent, None if it is unknown or expired; all are compared, whichever it is."""
        if len(sent) > LONGEST:
            return None
        wanted, found = digest(sent), self._environment
        if found is not None and not hmac.compare_digest(wanted, found.sha256):
            found = None
        for key in self._keys:
            if hmac.compare_digest(wanted, key.sha256):
                found = key
        return None if found is None or found.expired(self._now()) else found

    def read_again(self) -> Reading:
        """Return what the file says now; changes nothing here, so that a thread may wait for a file system that hangs."""
        assert self.file is not None
        with contextlib.suppress(OSError):  # read says it
            if self._signature == _signature(self.file.stat()):
                return Reading(signature=self._signature)
        try:
            content, status = read(self.file)
            settled = self._now().timestamp() - status.st_mtime > UNSETTLED
            return Reading(parse(content, self.file), _signature(status) if settled else None)
        except EbjdatError as error:
            return Reading(error=str(error))

    def take(self, reading: Reading) -> None:
        """Take the keys that were read. A file that is gone or wrong leaves the keys as they are, and is said once in the log."""
        self._signature = reading.signature
        if reading.error:
            if self._said != reading.error:
                self._said = reading.error
                log.error("%s; the keys that were read before remain", reading.error)
        elif reading.keys is not None and (reading.keys != self._keys or self._said):
            self._keys, self._said = reading.keys, ""
            log.info("%s was read again: %d keys", self.file, len(reading.keys))


def _signature(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_mode
