#!/usr/bin/env python3
"""Screen a folder or a glob for suspicious images: `python clients/screen.py 'incoming/*.jpg' -o report.csv --sheet sheet.html`.

Sends images concurrently and writes a CSV file with one row per file, the worst first: file, class, label, probability; whether it is
like the data (energy, p_value, suspicious, why); whether its label is within reach (margin, margin_p_value); decision, reasons, error.
--sheet writes a page of thumbnails in that order. Files that are images by their first bytes or suffix are sent; all others get a row
that says "skipped". Exit code: 0 nothing suspicious or to review, 3 something is, 1 an image was refused or there was none, 2 no server.
Needs httpx2, tqdm.
"""

import argparse
import csv
import errno
import glob
import html
import math
import os
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

import httpx2
from tqdm import tqdm

COLUMNS = (
    "file", "class", "label", "probability", "energy", "p_value", "suspicious", "why", "margin", "margin_p_value", "decision", "reasons",
    "error",
)  # fmt: skip
WITHHELD = ("energy", "p_value", "why", "margin", "margin_p_value", "decision", "reasons")
"""Columns that are empty when the server runs with --profile public, or where its bundle has no energy, calibration or margins."""
NUMBERS = ("probability", "energy", "p_value", "margin", "margin_p_value")
ON_SHEET = 1000  # images at most, the worst
SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif"}
SKIPPED = "skipped: "
Row = dict[str, Any]

# Reading a response. These lines are identical in all clients, so that each client is a single file to copy.
TRIES = 5
LONGEST = 30.0
"""Longest pause between two tries, in seconds, even if Retry-After asks for more."""
BUSY = (429, 502, 503, 504)


class Refused(Exception):
    """The server gave no usable answer; the message is one line, with the HTTP status if there was one."""


class Unreachable(Refused):
    """The server gave no answer at all."""


def key(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the X-API-Key header from LIT_SERVER_API_KEY, if set; exit with an error if a header cannot carry the key."""
    said = os.environ.get("LIT_SERVER_API_KEY", "").strip()
    if not (said.isascii() and said.isprintable()):
        parser.error("LIT_SERVER_API_KEY has characters that are not printable ASCII: set it to the server's key")
    return {"X-API-Key": said} if said else {}


def address(text: str) -> str:
    """Return a server address given on the command line; raise ArgumentTypeError if it is invalid."""
    try:
        url = httpx2.URL(text)
        url.raw_host.decode().encode("idna")  # as the socket will do
    except (httpx2.InvalidURL, UnicodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no address: give one such as http://localhost:8000")
    return text


def absent(client: httpx2.Client) -> str:
    """Return why no server can be reached, or "" if anything answers, even with an error."""
    try:
        client.get("/health", timeout=10)
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        return f"no server at {client.base_url} ({error}); start one with: make serve"
    except httpx2.RequestError:
        return ""  # reachable; later requests report other errors
    return ""


def ask(client: httpx2.Client, method: str, path: str, *, tries: int = TRIES, **request: Any) -> httpx2.Response:
    """Return a response of status 200; retry up to ``tries`` times if the server is busy or drops the connection.

    Raises Refused for every other response, including redirects, because the key would be sent to their target.
    Raises Unreachable if there was no response.
    """
    for attempt in range(1, tries + 1):
        wait = 2.0 ** (attempt - 2)
        try:
            answer = client.request(method, path, **request)
        except httpx2.TimeoutException as error:
            raise Unreachable(f"no answer in time ({type(error).__name__})") from error
        except httpx2.LocalProtocolError as error:
            raise Refused(one_line(f"a request that cannot be sent ({error})")) from error
        except httpx2.TransportError as error:
            if attempt == tries:
                raise Unreachable(one_line(f"no answer after {tries} tries ({type(error).__name__}: {error})")) from error
        except httpx2.RequestError as error:
            raise Refused(one_line(f"an answer that cannot be read ({type(error).__name__}: {error})")) from error
        else:
            if answer.status_code == 200:
                return answer
            if answer.status_code not in BUSY or attempt == tries:
                raise Refused(reason(answer))
            wait = pause(answer.headers.get("retry-after", ""), wait)
        time.sleep(wait)
    raise AssertionError("tries must be at least 1")


def pause(after: str, otherwise: float) -> float:
    """Return the pause in seconds that Retry-After (a number or a date) asks for, from 0 to LONGEST; ``otherwise`` if it is neither."""
    try:
        seconds = float(after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return otherwise
    return min(max(seconds, 0.0), LONGEST) if seconds == seconds else otherwise


def reason(answer: httpx2.Response) -> str:
    """Return why a response is unusable, in one line: its status and the server's message, if any."""
    status = f"HTTP {answer.status_code}"
    if answer.has_redirect_location:
        return one_line(f"{status}: moved to {answer.headers['location']}; give the new address as --url")
    try:
        said = answer.json()
    except (ValueError, RecursionError):
        said = None
    if isinstance(said, dict) and isinstance(said.get("detail"), str):
        return one_line(f"{status}: {said['detail']}")
    kind = answer.headers.get("content-type", "no content type").partition(";")[0]
    return one_line(f"{status} {answer.reason_phrase} ({kind}), not an ebjdat_serve answer: another server or a proxy may be in the way")


def one_line(text: str) -> str:
    """Return ``text`` as one line of at most 300 printable characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]


def named(file: Path) -> str:
    """Return a file's name, with bytes that are not UTF-8 as escapes."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def unwritten(error: OSError, output: Path | None = None) -> int:
    """Print why ``output``, or standard output, cannot be written; return the exit code, 1."""
    if output is None:  # otherwise Python flushes the rest at exit, and fails again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"cannot write {one_line(named(output)) if output else 'standard output'}: {error.strerror}", file=sys.stderr)
    return 1


# Reading an image. These lines are identical in classify.py, explain.py and screen.py.
LARGEST = 16 * 2**20
"""Largest image in bytes: the server's limit."""


def content(file: Path) -> bytes:
    """Return an image's bytes; raise OSError, also for a pipe or a device (they may never end) and for more than LARGEST bytes."""
    handed = file == Path("/dev/stdin") or file.parent in (Path("/dev/fd"), Path("/proc/self/fd"))  # the shell's <(…)
    if not handed and stat.S_IFMT(file.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise OSError(errno.EINVAL, "neither a file nor a folder")
    with file.open("rb") as opened:
        read = opened.read(LARGEST + 1)
    if len(read) > LARGEST:
        raise OSError(errno.EFBIG, f"the image has more than {LARGEST} bytes, which is the limit")
    return read


def find(patterns: list[str]) -> dict[Path, str]:
    """Return the files that paths, folders (searched recursively) and globs name, sorted, each with why it is not sent, or ""."""
    found: dict[Path, str] = {}

    def unreadable(error: OSError) -> None:
        found[Path(error.filename)] = error.strerror or str(error)

    for pattern in patterns:
        names = [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)
        if not names:
            found[Path(pattern)] = "no such file, and none matches"
        for path in map(Path, names):
            if not path.is_dir():
                found[path] = "" if names == [pattern] else skipped(path)  # a file named explicitly is always sent
            for folder, inner, files in os.walk(path, onerror=unreadable) if path.is_dir() else ():
                links = [name for name in inner if Path(folder, name).is_symlink()]
                found.update({Path(folder, name): f"{SKIPPED}a link to a folder; name it to search it" for name in links})
                found.update({Path(folder, name): skipped(Path(folder, name)) for name in files})
    return dict(sorted(found.items()))


def skipped(file: Path) -> str:
    """Return why a file found in a folder or by a glob is not sent, or ""."""
    if file.exists() and not file.is_file():
        return f"{SKIPPED}neither a file nor a folder"
    try:
        with file.open("rb") as opened:
            head = opened.read(16)
    except OSError:
        return ""  # its row will report the error
    if head.startswith(b"\x00\x05\x16\x07"):
        return f"{SKIPPED}a macOS metadata file"  # ._a.png
    image = is_image(head) or file.suffix.lower() in SUFFIXES  # damaged ones too: the server reports what is wrong
    return "" if image else f"{SKIPPED}no image, by its first bytes and by its suffix"


def is_image(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is a PNG, JPEG, GIF, TIFF, WebP, BMP, HEIC or AVIF."""
    return (
        head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\x00", b"MM\x00*"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"))
    )


def screen(client: httpx2.Client, file: Path, gone: Event) -> Row:
    """Return one CSV row; while the server is ``gone``, each image gets a single try, so that a long list still ends."""
    row = {"file": named(file)}
    request: dict[str, Any] = {"headers": {"Content-Type": "application/octet-stream"}}
    try:
        answer = ask(client, "POST", "/classify", tries=1 if gone.is_set() else TRIES, content=content(file), **request)
        gone.clear()
        try:
            said = answer.json()
            told = {name: said.get(name) if name in WITHHELD else said[name] for name in COLUMNS[1:-1]}
            if not all(math.isfinite(told[name] or 0.0) for name in NUMBERS) or told["probability"] is None:  # or TypeError: no number
                raise ValueError
            texts = {name: one_line(told[name]) for name in ("label", "why", "decision") if told[name] is not None}
            return {**row, **told, **texts, "reasons": one_line(" ".join(told["reasons"] or ()))}
        except (ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError) as error:
            raise Refused(reason(answer)) from error
    except Unreachable as error:
        gone.set()
        return {**row, "error": str(error)}
    except (Refused, OSError) as error:
        return {**row, "error": getattr(error, "strerror", None) or str(error)}


def main() -> int:
    """Screen all files and write the report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or quoted globs")
    parser.add_argument("-o", "--output", type=Path, help="CSV file (default: standard output)")
    parser.add_argument("--sheet", type=Path, help="HTML page of thumbnails, the worst first")
    parser.add_argument("-j", "--jobs", type=int, default=8, help="concurrent requests (%(default)s)")
    parser.add_argument("--url", type=address, default="http://localhost:8000", help="address of the server (%(default)s)")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    sys.stdout.reconfigure(encoding="utf-8", newline="")  # type: ignore[union-attr]
    files = find(options.images)
    with httpx2.Client(base_url=options.url, timeout=60, headers=key(parser)) as client:
        if not all(files.values()) and (missing := absent(client)):
            print(missing, file=sys.stderr)
            return 2
        if options.output and (options.output.is_file() or not options.output.exists()):
            try:
                options.output.open("ab").close()  # an earlier report stays until there is another
            except OSError as error:
                return unwritten(error, options.output)
        rows, counted, status = report(client, files, options.jobs)
        try:
            with options.output.open("w", encoding="utf-8", newline="") if options.output else nullcontext(sys.stdout) as sink:
                writer = csv.DictWriter(sink, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
                sink.flush()
        except OSError as error:
            return unwritten(error, options.output)
        try:
            if options.sheet:
                options.sheet.write_text(sheet(rows, options.sheet.parent), encoding="utf-8")
        except OSError as error:
            return unwritten(error, options.sheet)
        print(counted, file=sys.stderr)
        return status


def worst_first(row: Row) -> tuple[int, float]:
    """Return the place of a row: images to review or suspicious, those refused, the others, files skipped; of equals by p-value."""
    error = row.get("error", "")
    kind = 3 if error.startswith(SKIPPED) else 1 if error else 0 if to_review(row) else 2
    return kind, min(float(row[name]) if row.get(name) is not None else 1.0 for name in ("p_value", "margin_p_value"))


def to_review(row: Row) -> bool:
    """Return whether somebody should look at an image."""
    return bool(row.get("suspicious")) or row.get("decision") == "review"


def sheet(rows: list[Row], folder: Path) -> str:
    """Return an HTML page of the first rows' images, which it refers to from ``folder``."""
    figures = []
    for row in [row for row in rows if not row.get("error", "").startswith(SKIPPED)][:ON_SHEET]:
        place = quote(os.path.relpath(os.path.abspath(row["file"]), os.path.abspath(folder)))
        said = [row["error"]] if row.get("error") else [f"{row['label']} {row['probability']:.2f}", *(
            f"{word} {row[name]:.3f}" for name, word in (("p_value", "p"), ("margin_p_value", "margin p")) if row.get(name) is not None
        ), *([f"unlike the data: {row['why'] or 'suspicious'}"] if row["suspicious"] else [])]  # fmt: skip
        mark = ' class="bad"' if row.get("error") or to_review(row) else ""
        lines = "<br>".join(html.escape(line) for line in [Path(row["file"]).name, *said])
        figures.append(f'<figure{mark}><a href="{place}"><img src="{place}" loading="lazy"></a><figcaption>{lines}</figcaption></figure>')
    counted = f"{sum(map(to_review, rows))} of {len(rows)} files to review, the worst first; the first {len(figures)} are shown"
    return PAGE.replace("COUNTED", html.escape(counted)).replace("FIGURES", "\n".join(figures))


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'">
<title>Screened images</title><style> body { font: .8rem/1.35 system-ui, sans-serif; margin: 1rem; color-scheme: light dark }
  main { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem }
  figure { margin: 0; padding: .4rem; border: 2px solid #8884; border-radius: .4rem; overflow-wrap: anywhere }
  figure.bad { border-color: #c33 } img { width: 100%; height: 8rem; object-fit: contain; image-rendering: pixelated }
</style><h1>Screened images</h1><p>COUNTED</p><main>FIGURES</main></html>
"""


def report(client: httpx2.Client, files: dict[Path, str], jobs: int) -> tuple[list[Row], str, int]:
    """Return the rows, the worst first, a summary of the counts and the exit code."""
    gone, sent, rows = Event(), sum(not why for why in files.values()), list[Row]()

    def row_of(file: Path) -> Row:
        return {"file": named(file), "error": files[file]} if files[file] else screen(client, file, gone)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            rows.extend(tqdm(pool.map(row_of, files), total=len(files), unit="file", disable=not sys.stderr.isatty()))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            return sorted(rows, key=worst_first), "interrupted; the report has what was answered", 130
    left_out = sum(row.get("error", "").startswith(SKIPPED) for row in rows)
    refused = sum("error" in row for row in rows) - left_out
    suspicious, reviewed = sum(bool(row.get("suspicious")) for row in rows), sum(map(to_review, rows))
    counted = f"{sent} images, {suspicious} suspicious, {reviewed} to review, {refused} refused, {left_out} skipped"
    if unjudged := sum("error" not in row and row["suspicious"] is None for row in rows):
        counted += f"; {unjudged} not judged, since the model is not calibrated"
    return sorted(rows, key=worst_first), counted, 1 if refused or not sent else 3 if reviewed else 0


if __name__ == "__main__":
    sys.exit(main())
