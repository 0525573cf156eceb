"""What a network does to pixels in [0,1] before its first layer."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from ebjdat_serve.bounds import Bounds

Value = Annotated[float, Bounds(-1e6, 1e6)]


@dataclass(frozen=True)
class Normalisation:
    """(scale x - mean) / std, one mean and standard deviation per channel in the order of ``channels``; the default changes nothing."""

    scale: Annotated[float, Bounds(1e-6, 1e6)] = 1.0
    mean: list[Value] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    std: list[Annotated[float, Bounds(1e-6, 1e6)]] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    channels: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == 3:
            raise ValueError(f"mean and std are of three channels, not {len(self.mean)} and {len(self.std)}")

    @property
    def said(self) -> str:
        """Return it as a sentence shows it."""
        scaled = "x" if self.scale == 1 else f"{self.scale:g} x"
        return f"({scaled} - {tuple(self.mean)}) / {tuple(self.std)}, {self.channels.upper()}"
