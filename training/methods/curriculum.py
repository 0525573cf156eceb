"""DAT's curriculum: one more ascent step whenever the negatives are easily separated from data (arXiv 2510.13872)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class AucGate:
    """T rises by one whenever the mean AUC of the last ``window`` images reaches ``threshold``; then the window empties.

    T stays at ``cap``; while the adversary wins it stalls. ``patience`` batches without a rise force one (0: never).
    """

    threshold: float
    cap: int
    window: int
    patience: int = 0
    steps: int = 0
    waited: int = 0
    recent: list[float] = field(default_factory=list)

    def update(self, auc: float, images: int) -> None:
        """Record the AUC of one batch of ``images``."""
        if self.steps >= self.cap:
            return
        self.waited += 1
        full = math.ceil(self.window / images)
        self.recent = [*self.recent, auc][-full:]
        passed = len(self.recent) == full and sum(self.recent) / full >= self.threshold
        if passed or (self.patience and self.waited >= self.patience):
            self.steps, self.waited, self.recent = self.steps + 1, 0, []

    def state_dict(self) -> dict[str, Tensor]:
        return {"gate": torch.tensor([self.steps, self.waited, *self.recent], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        steps, waited, *recent = state["gate"].tolist()
        self.steps, self.waited, self.recent = int(steps), int(waited), recent


def auc(negative: Tensor, positive: Tensor) -> Tensor:
    """Return P(a positive's score > a negative's), ties counted half; shapes (N,) and (M,)."""
    difference = positive[:, None] - negative[None, :]
    return (difference > 0).float().mean() + 0.5 * (difference == 0).float().mean()
