"""JSON as RFC 8259 has it: Python's reader takes NaN and Infinity too, which no other does."""

import json
from typing import Any, NoReturn


def loads(text: str | bytes | bytearray) -> Any:
    """Return the JSON document in ``text``. Raises ValueError: not JSON; RecursionError: nested too deep."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
