#!/usr/bin/env python3
"""Screen a folder or a glob for suspicious pictures: `python clients/screen.py 'incoming/*.jpg' -o report.csv`.

Sends pictures concurrently, writes file, class, label, probability, energy, p_value, suspicious, error to CSV, in the
order of the files' names. Exit code: 0 nothing suspicious, 3 something is, 1 a picture was refused, 2 no server. Needs httpx2, tqdm.
"""

import argparse
import csv
import glob
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
from tqdm import tqdm

COLUMNS = ("file", "class", "label", "probability", "energy", "p_value", "suspicious", "error")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
TRIES = 5
KEY = {"X-API-Key": os.environ["LIT_SERVER_API_KEY"]} if "LIT_SERVER_API_KEY" in os.environ else {}


def find(patterns: list[str]) -> Iterator[Path]:
    """Yield the pictures that folders (searched through) and globs name, in name order, once each."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found.update(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        elif path.is_file():
            found.add(path)
        else:
            found.update(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    yield from sorted(found)


def screen(client: httpx2.Client, file: Path) -> dict[str, Any]:
    """Return one CSV row; a busy server (503) is asked again after the time it names."""
    try:
        body = file.read_bytes()
    except OSError as error:
        return {"file": file, "error": error.strerror}
    for _ in range(TRIES):
        try:
            answer = client.post("/classify", content=body, headers={"Content-Type": "application/octet-stream"})
        except httpx2.TimeoutException as error:
            return {"file": file, "error": f"no answer in time ({type(error).__name__})"}
        if answer.status_code != 503:
            break
        time.sleep(float(answer.headers.get("retry-after", 1)))
    said = answer.json()
    if answer.is_error:
        return {"file": file, "error": said["detail"]}
    return {"file": file, **{name: said[name] for name in COLUMNS if name in said}}


def main() -> int:
    """Screen everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pictures", nargs="+", help="folders, files or quoted globs")
    parser.add_argument("-o", "--output", type=Path, help="CSV file; standard output by default")
    parser.add_argument("-j", "--jobs", type=int, default=8, help="requests at a time (%(default)s)")
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    files = list(find(options.pictures))
    if not files:
        print("no PNG, JPEG or WebP file found", file=sys.stderr)
        return 1
    suspicious = refused = 0
    with (
        httpx2.Client(base_url=options.url, timeout=60, headers=KEY) as client,
        ThreadPoolExecutor(options.jobs) as pool,
        options.output.open("w", newline="", encoding="utf-8") if options.output else sys.stdout as sink,
    ):
        report = csv.DictWriter(sink, COLUMNS)
        report.writeheader()
        try:
            for row in tqdm(
                pool.map(lambda file: screen(client, file), files), total=len(files), unit="picture", disable=not sys.stderr.isatty()
            ):
                report.writerow(row)
                suspicious += bool(row.get("suspicious"))
                refused += "error" in row
        except httpx2.TransportError as error:
            pool.shutdown(wait=False, cancel_futures=True)
            print(f"no server at {options.url} ({error}); start one with: make serve", file=sys.stderr)
            return 2
    print(f"{len(files)} pictures, {suspicious} suspicious, {refused} refused", file=sys.stderr)
    return 1 if refused else 3 if suspicious else 0


if __name__ == "__main__":
    sys.exit(main())
