#!/usr/bin/env python3
"""Classify pictures: `python clients/classify.py cat.png dog.jpg [--url http://localhost:8000]`. Needs httpx2."""

import argparse
import os
import sys
from pathlib import Path

import httpx2

KEY = {"X-API-Key": os.environ["LIT_SERVER_API_KEY"]} if "LIT_SERVER_API_KEY" in os.environ else {}


def main() -> int:
    """Print one line a picture; return 1 when one was refused, 2 when there is no server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pictures", nargs="+", type=Path)
    parser.add_argument("--url", default="http://localhost:8000")
    options = parser.parse_args()
    refused = 0
    with httpx2.Client(base_url=options.url, timeout=60, headers=KEY) as client:
        for picture in options.pictures:
            try:
                answer = client.post("/classify", content=picture.read_bytes(), headers={"Content-Type": "application/octet-stream"})
            except OSError as error:
                print(f"{picture}: {error.strerror}", file=sys.stderr)
                refused += 1
                continue
            except httpx2.TransportError as error:
                print(f"no server at {options.url} ({error}); start one with: make serve", file=sys.stderr)
                return 2
            said = answer.json()
            if answer.is_error:
                print(f"{picture}: {said['detail']}", file=sys.stderr)
                refused += 1
                continue
            mark = "  SUSPICIOUS" if said["suspicious"] else ""
            print(f"{picture}: {said['label']} {said['probability']:.3f}  energy {said['energy']:.3f}  p {said['p_value']:.3f}{mark}")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
