"""List the image files of a folder, recognised by their first bytes; other files are reported, never skipped silently."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ebjdat_serve.decoding import judge
from ebjdat_serve.errors import visible

SHOWN = 20


@dataclass
class Listing:
    """Image files sorted by name, and the other files by the reason they are left out."""

    images: list[Path] = field(default_factory=list)
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, reason: str, file: Path) -> None:
        """Record a file as left out for ``reason``."""
        self.skipped.setdefault(reason, []).append(file)

    def note(self) -> str:
        """Return a line that counts and names the files left out, or an empty string."""
        count = sum(map(len, self.skipped.values()))
        parts = [f"{len(files)} {reason} ({some(files)})" for reason, files in sorted(self.skipped.items())]
        among = f" of {count + len(self.images)} files" if self.images else ""
        return f"left out {count}{among}: {'; '.join(parts)}" if count else ""


def list_images(folder: Path, listing: Listing | None = None) -> Listing:
    """Return the images in ``folder`` and its sub-folders, added to ``listing`` if there is one; links are followed, each folder once.

    A file with an image's name but not its first bytes is listed too: reading it reports the damage. Raises OSError.
    """
    found = listing or Listing()
    for file in walk(folder):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            found.skip("hidden", file)  # such as a Mac's ._a.png, or files in .ipynb_checkpoints
            continue
        if not file.is_file():  # opening a pipe blocks
            found.skip("neither file nor folder" if file.exists() else "broken link", file)
            continue
        kind = format_of(file)
        if kind in judge.accepted() or (not kind and Image.registered_extensions().get(file.suffix.lower()) in judge.accepted()):
            found.images.append(file)
        else:
            found.skip(f"{kind}, which is not supported" if kind else "not an image", file)
    return found


def walk(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield everything below ``folder`` but folders, sorted by name, in the same order on every machine."""
    seen = set() if seen is None else seen
    about = folder.stat()
    if (about.st_dev, about.st_ino) in seen:
        return
    seen.add((about.st_dev, about.st_ino))
    for entry in sorted(folder.iterdir(), key=order):
        if entry.is_dir():
            yield from walk(entry, seen)
        else:
            yield entry


def format_of(file: Path) -> str:
    """Return the format that a file's first bytes announce, such as PNG or PSD, or an empty string."""
    Image.init()
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)  # HEIC and AVIF list what they are
    except OSError:
        return ""  # reading it reports why
    if len(head) < 16:
        return ""
    if (kind := judge.format_of(head)) in judge.JUDGES:
        return kind
    for name in Image.OPEN:
        accept = Image.OPEN[name][1]
        if accept and accept(head) is True:
            return name
    return ""


def order(path: Path) -> tuple[str, str]:
    """Return the sort key of a file: its name in Unicode's normal form."""
    return unicodedata.normalize("NFC", printable(path.name)), printable(path.name)


def printable(path: Path | str) -> str:
    """Return a path as text that can be printed and stored: bytes that are not UTF-8, and what a reader would not see, as escapes."""
    try:
        return visible(os.fsencode(path).decode("utf-8", "backslashreplace"))
    except UnicodeEncodeError:  # text that this locale has no file name for
        return visible(str(path))


def some(files: Sequence[Path]) -> str:
    """Return the names of files, the first SHOWN of many."""
    more = f", and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(printable(file.name) for file in files[:SHOWN]) + more


def class_name(folder: Path) -> str:
    """Return the name of a class: its folder's, in Unicode's composed form (NFC). Raises ValueError for a name that is not UTF-8."""
    return unicodedata.normalize("NFC", os.fsencode(folder.name).decode("utf-8"))
