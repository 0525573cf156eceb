"""Write a torch network that was found, its weights and graphs, into the draft of a bundle."""

from collections.abc import Callable
from dataclasses import replace

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines import Floats
from ebjdat_serve.exporting.functions import export_network
from ebjdat_serve.exporting.reference import write_selftest
from ebjdat_serve.manifest import YES
from ebjdat_serve.networks import Network


def write(network: Network, draft: Bundle, images: Floats, say: Callable[[str], None]) -> Bundle:
    """Return the draft with weights, graphs, and what the network says of ``images`` (N, 3, H, W) in [0,1] as its self-test.

    What turned out not to export is said in its capabilities.
    """
    m = draft.manifest
    done = export_network(network, draft.path, m.input.height, m.input.width, {"name": m.name, "version": m.version}, say)
    can = replace(m.capabilities, features=done.features, gradient=done.gradient)
    if done.gradient != YES:
        can = replace(can, generate=f"drawing follows a gradient: {done.gradient}")
    say("asking the network itself, for the self-test")
    written = draft.update(*done.files, capabilities=can)
    write_selftest(written, images, network)
    return written.update("selftest.safetensors")
