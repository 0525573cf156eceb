#!/usr/bin/env python3
"""Classify images: `python clients/classify.py cat.png dog.jpg [--url http://localhost:8000]`. Needs httpx2."""

import argparse
import errno
import os
import stat
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2

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


def classify(client: httpx2.Client, image: Path) -> str:
    """Return the server's answer for one image as a line of text; raise Refused or OSError."""
    answer = ask(client, "POST", "/classify", content=content(image), headers={"Content-Type": "application/octet-stream"})
    try:
        said = answer.json()
        mark = f"  SUSPICIOUS {one_line(said.get('why') or '')}".rstrip() if said["suspicious"] else ""
        mark += "  REVIEW" if said.get("decision") == "review" else ""
        told = [(name, word) for name, word in (("energy", "energy"), ("p_value", "p")) if said.get(name) is not None]
        more = "".join(f"  {word} {said[name]:.3f}" for name, word in told)
        return one_line(said["label"]) + f" {said['probability']:.3f}{more}{mark}"  # serve --profile public tells no more
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused(reason(answer)) from error


def main() -> int:
    """Print one line per image; return 1 if an image was refused or a line cannot be written, 2 if there is no server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, or another format of the server's /info")
    parser.add_argument("--url", type=address, default="http://localhost:8000", help="address of the server (%(default)s)")
    options = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    refused = 0
    with httpx2.Client(base_url=options.url, timeout=60, headers=key(parser)) as client:
        if missing := absent(client):
            print(missing, file=sys.stderr)
            return 2
        for image in options.images:
            name = one_line(named(image))
            try:
                said = classify(client, image)
            except (Refused, OSError) as error:
                print(f"{name}: {getattr(error, 'strerror', None) or error}", file=sys.stderr)
                refused += 1
                continue
            try:
                print(f"{name}: {said}", flush=True)
            except OSError as error:
                return unwritten(error)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
