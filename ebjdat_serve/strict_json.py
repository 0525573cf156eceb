"""JSON as RFC 8259 has it: Python's reader takes NaN and Infinity too, which no other does, and 1e999 for infinity."""

import json
import math
from typing import Any, NoReturn


def loads(text: str | bytes | bytearray, *, unique: bool = False) -> Any:
    """Return the JSON document in ``text``; with ``unique`` no key may be given twice, of which others may read the first.

    Raises ValueError: not JSON; RecursionError: nested too deep.
    """
    return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_unique if unique else None)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:40]!r} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
