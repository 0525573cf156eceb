"""The images of a folder, told by their content whatever they are called; what is no image is named, never dropped in silence."""

import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ebjdat_serve.decoding import judge

SHOWN = 20


@dataclass
class Listing:
    """Images in the order of their names, and what else lies there: files by the reason for which they are left out."""

    pictures: list[Path] = field(default_factory=list)
    skipped: dict[str, list[Path]] = field(default_factory=dict)

    def skip(self, reason: str, file: Path) -> None:
        """Leave a file out."""
        self.skipped.setdefault(reason, []).append(file)

    def note(self) -> str:
        """Return a line that counts and names what is left out; nothing when that is nothing."""
        count = sum(map(len, self.skipped.values()))
        parts = [f"{len(files)} {reason} ({some(files)})" for reason, files in sorted(self.skipped.items())]
        among = f" of {count + len(self.pictures)} files" if self.pictures else ""
        return f"left out {count}{among}: {'; '.join(parts)}" if count else ""


def list_pictures(folder: Path, listing: Listing | None = None) -> Listing:
    """Return the images in ``folder`` and its sub-folders, added to ``listing`` if there is one; links are followed, each folder once.

    A file that is called an image but does not begin as one counts as one: whoever reads it will find it damaged. Raises OSError.
    """
    found = listing or Listing()
    for file in walk(folder):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            found.skip("hidden", file)  # such as a Mac's ._a.png, or what lies in .ipynb_checkpoints
            continue
        if not file.is_file():  # a pipe would keep whoever opens it waiting
            found.skip("neither file nor folder" if file.exists() else "broken link", file)
            continue
        kind = format_of(file)
        if kind in judge.accepted() or (not kind and Image.registered_extensions().get(file.suffix.lower()) in judge.accepted()):
            found.pictures.append(file)
        else:
            found.skip(f"{kind}, which is not read" if kind else "not of an image", file)
    return found


def walk(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[Path]:
    """Yield all below ``folder`` that is no folder, in the order of names, which is the same on every machine."""
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
    """Return the format that a file begins as, as PNG or PDF; nothing for what is no image."""
    Image.init()
    try:
        with file.open("rb") as opened:
            head = opened.read(4096)  # HEIC and AVIF list what they are
    except OSError:
        return ""  # whoever reads it says why
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
    """Return the key by which files are sorted: the name in its normal form."""
    return unicodedata.normalize("NFC", shown(path.name)), shown(path.name)


def shown(path: Path | str) -> str:
    """Return a path as text that can be printed and stored: bytes that are not UTF-8 as escapes."""
    try:
        return os.fsencode(path).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # text that this locale has no file name for
        return str(path)


def some(files: Sequence[Path]) -> str:
    """Return the names of files, of many the first ones."""
    more = f", and {len(files) - SHOWN} more" if len(files) > SHOWN else ""
    return ", ".join(shown(file.name) for file in files[:SHOWN]) + more


def class_name(folder: Path) -> str:
    """Return the name of a class: its folder's, in Unicode's composed form (NFC). Raises ValueError for a name that is not UTF-8."""
    return unicodedata.normalize("NFC", os.fsencode(folder.name).decode("utf-8"))
