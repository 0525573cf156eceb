"""Write a torch network that was found, its weights and graphs, into the draft of a bundle."""

from safetensors.torch import save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Floats
from ebjdat_serve.exporting.bundle_graphs import export
from ebjdat_serve.exporting.reference import write_selftest
from ebjdat_serve.networks import Network


def write(network: Network, draft: Bundle, images: Floats) -> Bundle:
    """Return the draft with weights, graphs, and what the network says of ``images`` (N, 3, H, W) in [0,1] as its self-test."""
    file = draft.path / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    file.chmod(0o644)  # safetensors writes files that only their owner may read
    exported = export(draft.update(file.name))
    write_selftest(exported, images)
    return exported.update("selftest.safetensors")
