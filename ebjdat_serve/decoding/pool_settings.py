"""What decoders may use: how many there are, their memory and their time."""

from dataclasses import dataclass, field

from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.errors import EbjdatError

LIGHT = 64 * 2**20
"""Bytes that each decoder of large images may use without leave."""


@dataclass(frozen=True)
class PoolSettings:
    """Lengths in bytes, times in seconds."""

    limits: Limits = field(default_factory=Limits)
    small: int = 1  # decoders of small images
    large: int = 2  # decoders of large ones
    memory: int = 512 * 2**20  # that all decodes of large images may use together
    small_timeout: float = 1.0  # of one message of small images
    timeout: float = 9.0  # of one large decode, once it has begun

    def __post_init__(self) -> None:
        if self.small < 1 or self.large < 1:
            raise EbjdatError(f"there must be at least 1 decoder of small and of large images, not {self.small} and {self.large}")
        if self.heavy_memory < self.limits.max_memory:
            least = (self.limits.max_memory + LIGHT * (self.large - 1)) // 2**20
            raise EbjdatError(f"the memory of decoders must be at least {least} MiB for one image of {self.limits.max_memory // 2**20} MiB")

    @property
    def heavy_memory(self) -> int:
        """Bytes for decodes that need more than LIGHT."""
        return self.memory - LIGHT * (self.large - 1)
