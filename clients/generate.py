#!/usr/bin/env python3
"""Draw pictures of a class: `python clients/generate.py cat -n 16 -o cats.png [--url http://localhost:8000]`. Needs httpx2."""

import argparse
import os
import sys
from pathlib import Path

import httpx2

KEY = {"X-API-Key": os.environ["LIT_SERVER_API_KEY"]} if "LIT_SERVER_API_KEY" in os.environ else {}


def main() -> int:
    """Write one PNG (a grid); return 1 when the request was refused, 2 when there is no server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("wanted", metavar="class", help="class index or name")
    parser.add_argument("-n", type=int, default=1, help="how many")
    parser.add_argument("-o", "--output", type=Path, default=Path("out.png"))
    parser.add_argument("--steps", type=int, help="Langevin steps; the model's own number by default")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--scale", type=int, default=4, help="PNG pixels per image pixel (%(default)s)")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--step-size", type=float, help="in pixel units of [0,1]; the model's own by default")
    parser.add_argument("--temperature", type=float, help="noise variance in units of the model's own (1)")
    options = parser.parse_args()
    names = ("n", "scale", "steps", "seed", "step_size", "temperature")
    wanted = {"class": options.wanted, **{name: getattr(options, name) for name in names}}
    try:
        query = {name: value for name, value in wanted.items() if value is not None}
        answer = httpx2.get(f"{options.url}/generate", params=query, timeout=180, headers=KEY)
    except httpx2.TransportError as error:
        print(f"no server at {options.url} ({error}); start one with: make serve", file=sys.stderr)
        return 2
    if answer.is_error:
        print(answer.json()["detail"], file=sys.stderr)
        return 1
    options.output.write_bytes(answer.content)
    h = answer.headers
    print(f"{options.output}: class {h['x-class']} ({h['x-label']}), seed {h['x-seed']}, {h['x-steps']} steps, energy {h['x-energy']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
