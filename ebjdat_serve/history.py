"""served.json in a store: which version a server served last, and which were served under --trust, in order.

With it a restarted server goes on with what it served when ``current`` is refused, and under --trust an older signed bundle is told from a
newer one. Servers write it when they begin to serve a version, `publish` and `rollback` when they change ``current`` under --trust. It is
not signed: whoever may write the store may change it.
"""

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from ebjdat_serve.atomic import replacing
from ebjdat_serve.bundle import Bundle, read_json
from ebjdat_serve.errors import BundleError, cause
from ebjdat_serve.parsing import parse

SERVED_FILE = "served.json"
DATED = re.compile(r"(\d{4})\.(\d\d)\.(\d\d)\b.*")
REVISION = re.compile(r"(.*)\.r(\d+)")


@dataclass(frozen=True)
class Version:
    """A version that was served under --trust: the fields of its manifest that tell its age, and its ``Bundle.served``."""

    name: str
    version: str
    started: str
    key: str

    @staticmethod
    def of(bundle: Bundle) -> "Version":
        """Return the version that ``bundle`` is."""
        m = bundle.manifest
        return Version(m.name, m.version, m.provenance.started, bundle.served)

    @property
    def age(self) -> tuple[str, float, int]:
        """The day of its export, the time its training began, and its revision; an older version has a smaller one."""
        began = began_at(self.started)
        dated, revision = DATED.match(self.version), REVISION.fullmatch(self.version)
        day = "-".join(dated.groups()) if dated else f"{began:%Y-%m-%d}"
        return day, began.timestamp(), int(revision[2]) if revision else 0


@dataclass(frozen=True)
class History:
    """The content of served.json.

    last       folder of the version that a server served last
    keys       public keys, in hex, that servers trusted last
    versions   what was served under --trust, each once, the last one last
    """

    last: str = ""
    keys: list[str] = field(default_factory=list)
    versions: list[Version] = field(default_factory=list)

    @property
    def trust(self) -> tuple[bytes, ...]:
        """The public keys that servers of the store trusted last; none: no server had --trust."""
        return tuple(bytes.fromhex(key) for key in self.keys)

    def superseded(self, bundle: Bundle) -> str:
        """Return why ``bundle`` is older than what was served last under --trust, or an empty string."""
        version, newest = Version.of(bundle), self.versions[-1] if self.versions else None
        if newest is None or version.key == newest.key:
            return ""
        again = any(version.key == served.key for served in self.versions)
        if not again and version.age >= newest.age:
            return ""
        why = "was served before" if again else "is older than"
        return f"{version.name}@{version.version} {why} {newest.name}@{newest.version}, which was served last under serve --trust"

    def with_trusted(self, bundle: Bundle, trust: tuple[bytes, ...], *, newest: bool) -> "History":
        """Return this history with ``bundle`` served under ``trust``; with ``newest`` it becomes the last, if it is there too."""
        version = Version.of(bundle)
        there = any(version.key == served.key for served in self.versions)
        others = [served for served in self.versions if served.key != version.key]
        versions = [*others, version] if newest or not there else self.versions
        return replace(self, keys=[key.hex() for key in trust], versions=versions)


def began_at(started: str) -> datetime:
    """Return the time that a manifest says training began, the epoch for one that is no ISO time; without a zone it is UTC."""
    try:
        began = datetime.fromisoformat(started)
    except ValueError:
        return datetime.fromtimestamp(0, UTC)
    return began if began.tzinfo else began.replace(tzinfo=UTC)


def read_history(store: Path) -> History:
    """Return what served.json of ``store`` says, an empty history without one; raise BundleError for one that is damaged."""
    file = store / SERVED_FILE
    try:
        there = file.exists()
    except OSError as error:
        raise BundleError(f"{file} cannot be read: {cause(error)}") from error
    if not there:
        return History()
    try:
        history = parse(History, read_json(file), str(file))
        for key in history.trust:
            if len(key) != 32:
                raise ValueError("a public key has 32 bytes")
    except (BundleError, ValueError) as error:
        raise BundleError(f"{error}; restore {file}, or remove it if {store} points at the right version") from error
    return history


def write_history(store: Path, history: History) -> None:
    """Replace served.json of ``store``, on disk when this returns; the caller holds the store's lock. Raises OSError."""
    with replacing(store / SERVED_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(history), indent=1) + "\n", encoding="utf-8")
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
    folder = os.open(store, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
