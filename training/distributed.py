"""Multi-GPU training: each rank takes its share of one global stream of indices and noise.

Under ``torchrun`` every rank draws what the whole batch needs from the same generator and keeps its own rows, so that two
ranks with half the batch each compute what one rank with the whole batch computes.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import TrainingError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
"""The longest that ranks compute apart between two collectives of a step: beyond it NCCL ends a run that hangs."""
PATIENCE = timedelta(days=7)
"""The longest that ranks wait for the first one, which may be downloading; if it ends, its connections close and they end at once."""


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, the number of processes, and their group for what hosts tell each other (None: the default one)."""

    rank: int = 0
    world: int = 1
    hosts: dist.ProcessGroup | None = field(default=None, compare=False, repr=False)

    def share(self, rows: Tensor) -> Tensor:
        """Return this rank's contiguous rows of a global tensor."""
        each = len(rows) // self.world
        return rows[self.rank * each : (self.rank + 1) * each]

    def part(self, name: str, whole: int) -> int:
        """Return ``whole`` divided by the number of ranks; raise TrainingError when it does not divide evenly."""
        if whole % self.world:
            raise TrainingError(f"{name}={whole} cannot be divided among {self.world} processes: set a multiple of it")
        return whole // self.world

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of every rank in order, without a graph."""
        if self.world == 1:
            return rows.detach()
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.detach().contiguous())
        return torch.cat(parts)

    def everywhere(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Return each (N,) of all ranks, in one collective, such that gradients averaged over ranks are those of the global loss.

        For losses that are not means over images, such as a quotient of batch statistics.
        """
        if self.world == 1:
            return rows
        everyone: Tensor = _Gather.apply(torch.stack(rows, dim=1), self)  # type: ignore[no-untyped-call]
        return everyone.unbind(dim=1)

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is set on any rank, the same on all."""
        if self.world == 1:
            return flag
        seen = torch.tensor(float(flag))
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=self.hosts)
        return bool(seen)

    def agree(self, value: T) -> T:
        """Return the first rank's ``value`` on every rank."""
        if self.world == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, group=self.hosts)
        first: T = values[0]
        return first

    def wait(self) -> None:
        """Wait for every rank, as long as it takes."""
        if self.world > 1:
            dist.barrier(group=self.hosts)

    def leave(self) -> None:
        """Close the groups: the first rank goes on alone."""
        if self.world > 1:
            dist.destroy_process_group()

    def mean(self, value: Tensor) -> Tensor:
        """Return the average of a detached tensor over the ranks."""
        if self.world == 1:
            return value
        total = value.detach().clone()
        dist.all_reduce(total)
        return total / self.world


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ranks: Ranks = ctx.ranks
        # every rank computes the same global loss; averaging over ranks divides the gradient's sum by world
        return ranks.share(gradients[0]) * ranks.world, None


@dataclass
class Noise:
    """The run's only source of randomness on the device: global draws, of which a rank keeps its rows."""

    generator: torch.Generator
    ranks: Ranks = Ranks()

    @staticmethod
    def seeded(seed: int, device: torch.device | None = None, ranks: Ranks = Ranks()) -> "Noise":
        """Return a fresh source; every rank passes the same seed."""
        return Noise(torch.Generator(device or torch.device("cpu")).manual_seed(seed), ranks)

    def normal(self, *shape: int) -> Tensor:
        """Return this rank's rows of N(0, 1)."""
        n, *rest = shape
        return self.ranks.share(torch.randn(n * self.ranks.world, *rest, generator=self.generator, device=self.generator.device))

    def uniform(self, *shape: int) -> Tensor:
        """Return this rank's rows of U[0, 1)."""
        n, *rest = shape
        return self.ranks.share(torch.rand(n * self.ranks.world, *rest, generator=self.generator, device=self.generator.device))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Return this rank's rows of uniform integers in [0, high)."""
        n, *rest = shape
        size = (n * self.ranks.world, *rest)
        return self.ranks.share(torch.randint(0, high, size, generator=self.generator, device=self.generator.device))


def connect() -> Ranks:
    """Join the process group of torchrun, NCCL on GPUs and gloo on CPUs; do nothing for a single process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks()
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", timeout=PATIENCE)
        return Ranks(dist.get_rank(), world)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", timeout=TIMEOUT, device_id=device)
    return Ranks(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=PATIENCE))
