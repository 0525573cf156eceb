#!/usr/bin/env python3
"""Write the graphs of a bundle: `python export/to_onnx.py BUNDLE`; ebjdat_serve/exporting/ says what they compute.

The graphs hold no weights: their initialisers point into weights.safetensors by byte offset.
"""

from pathlib import Path

import torch

from ebjdat_serve.bundle import GRAPHS
from ebjdat_serve.console import command, parser_of
from ebjdat_serve.cpus import threads
from ebjdat_serve.editing import FORCED, edit
from ebjdat_serve.exporting.bundle_graphs import export, export_again, title, write
from ebjdat_serve.exporting.onnx_files import finish

__all__ = ["export", "export_again", "finish", "title", "write"]


def main() -> None:
    """Export the bundle named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--force", action="store_true", help=FORCED)
    options = parser.parse_args()
    torch.set_num_threads(threads())
    with command(parser):
        bundle = edit(options.bundle, export_again, force=options.force, renews=GRAPHS)
        for name in GRAPHS:
            print(f"{bundle.path / name}  {bundle.manifest.files[name].bytes / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
