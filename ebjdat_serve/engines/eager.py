"""Eager torch from weights.safetensors alone: the reference that the graphs are compared with, and the fallback."""

import torch
from safetensors.torch import load_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.energy import energy, score
from ebjdat_serve.engines import Device, Floats, Labels
from ebjdat_serve.errors import EngineError
from ebjdat_serve.wideresnet import WideResNet, build


def load_model(bundle: Bundle) -> WideResNet:
    """Return the bundle's network in eval mode on the CPU, its parameters taking no gradient."""
    m = bundle.manifest
    model = build(m.architecture.depth, m.architecture.width, len(m.labels), load_file(bundle.path / "weights.safetensors"))
    return model.requires_grad_(False)


class TorchEngine:
    """The Engine protocol on eager PyTorch, fp32."""

    name = "torch"

    def __init__(self, bundle: Bundle, device: Device = "auto", threads: int = 1) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError("CUDA was asked for but torch sees no GPU: check the driver, or use --device cpu")
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        self.provider = f"torch {torch.__version__} {self._device.type}"
        self._model = load_model(bundle).to(self._device)

    def classify(self, image: Floats) -> tuple[Floats, Floats]:
        """Return logits (N, K) and energy E(x) (N,), nats."""
        with torch.inference_mode():
            logits = self._model(torch.from_numpy(image).to(self._device))
            return logits.cpu().numpy(), energy(logits).cpu().numpy()

    def score(self, image: Floats, label: Labels) -> tuple[Floats, Floats]:
        """Return -dE(x,y)/dx (N, 3, H, W) and E(x,y) (N,); label -1 is the marginal E(x)."""
        gradient, energies = score(self._model, torch.from_numpy(image).to(self._device), torch.from_numpy(label).to(self._device))
        return gradient.cpu().numpy(), energies.cpu().numpy()
