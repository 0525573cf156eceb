"""Rows that an engine moves together, a step at a time: Langevin chains, searches for a counterfactual."""

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray


class Batch:
    """The base of dataclasses of arrays with N rows each; rows are independent, so they can be joined and split at any step."""

    step: NDArray[np.int64]  # (N,) steps taken
    moving: ClassVar[tuple[str, ...]]  # the fields that a step changes

    def __len__(self) -> int:
        return len(self.step)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name."""
        return dict(vars(self))

    def rows(self, chosen: Any) -> Self:
        """Return the rows at ``chosen``: a slice, indices or a mask."""
        return type(self)(*(array[chosen] for array in vars(self).values()))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return all rows of ``parts``, in order."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)))

    def put(self, rows: Any, moved: Self) -> None:
        """Write what a step changes of ``moved`` to ``rows``, in place."""
        for name in self.moving:
            getattr(self, name)[rows] = getattr(moved, name)
