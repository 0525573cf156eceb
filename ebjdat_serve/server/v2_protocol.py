"""Words of the Open Inference Protocol v2 that reading and answering share."""

import math
from dataclasses import dataclass
from typing import Any

INPUT, BYTES, UINT8 = "image", "BYTES", "UINT8"
HEADER_LENGTH = "Inference-Header-Content-Length"
"""Header with the bytes of a body that are JSON, where binary data follow it."""


def is_v2(path: str) -> bool:
    """Return whether a path is of the protocol."""
    return path == "/v2" or path.startswith("/v2/")


@dataclass(frozen=True)
class Wanted:
    """An output that a request asks for."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """What a request asks; ``outputs`` None: all, binary where ``binary``.

    ``data`` is the input's in JSON, None where it follows the JSON in ``binary_size`` bytes.
    """

    id: str | None
    datatype: str
    shape: tuple[int, ...]
    data: Any
    binary_size: int
    outputs: tuple[Wanted, ...] | None
    binary: bool

    @property
    def n(self) -> int:
        """Images."""
        return self.shape[0]

    @property
    def elements(self) -> int:
        """Elements of the input."""
        return math.prod(self.shape)
