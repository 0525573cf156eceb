"""What a network that a file describes would take, by arithmetic: built and run on torch's meta device, where tensors have sizes alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ebjdat_serve.errors import OF_NETWORKS, EbjdatError, first_line

MOST_PARTS = 10_000
"""Layers and parameters: an EfficientNet-B7 has 1,810, a ViT-g 1,459."""
MOST_BYTES = 8 * 2**30
"""Of all values that one image makes, most of which a gradient keeps: EfficientNet-B7 at 600 pixels makes 3.7 GiB, ViT-L at 512 7.9."""
MOST_OPERATIONS = 10**13
"""Floating-point operations for one image: a ViT-g at 518 pixels takes 3.6e12."""


def planned(make: Callable[[], nn.Module]) -> nn.Module:
    """Return what ``make`` builds, on the meta device, in eval mode; raise EbjdatError once it has more parts than any classifier."""
    with torch.device("meta"), bounded_parts():
        return make().eval()


@contextmanager
def bounded_parts() -> Iterator[None]:
    """Raise EbjdatError once networks that are built within have registered more than MOST_PARTS layers and parameters."""
    count = 0

    def registered(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MOST_PARTS:
            raise EbjdatError(f"it has more than {MOST_PARTS} layers and parameters, which no classifier has: check its sizes")

    handles = [register(registered) for register in (register_module_module_registration_hook, register_module_parameter_registration_hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Cost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all values that operators make within, and their floating-point operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count; raise TooCostly beyond the bounds."""
        made = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(value.numel() * value.element_size() for value in tree_leaves(made) if isinstance(value, Tensor))
        if counted := flop_registry.get(func._overloadpacket):
            self.operations += int(counted(*args, **(kwargs or {}), out_val=made))
        if self.bytes > MOST_BYTES:
            raise TooCostly(f"more than {MOST_BYTES / 2**30:g} GiB of memory")
        if self.operations > MOST_OPERATIONS:
            raise TooCostly(f"more than {MOST_OPERATIONS:.0e} operations")
        return made


class TooCostly(EbjdatError):
    """A network takes more than any classifier that is imported."""


def check_cost(module: nn.Module, height: int, width: int) -> Cost:
    """Return what one image (1, 3, H, W) costs in a module on the meta device.

    Raises EbjdatError beyond the bounds, at the operator that exceeds them, and for a module that does not take such an image.
    """
    cost = Cost()
    try:
        with torch.no_grad(), torch.device("meta"), cost:
            module(torch.empty(1, 3, height, width))
    except TooCostly as error:
        raise EbjdatError(
            f"one image of {height} x {width} would take {error}: which no classifier does; check patches, heads, layers and sizes"
        ) from error
    except OF_NETWORKS as error:
        raise EbjdatError(f"it does not take images of {height} x {width}: {type(error).__name__}: {first_line(error)}") from error
    return cost
