"""One model that classifies robustly, flags inputs unlike its training data, and generates images of its classes.

Vocabulary: image (N,3,H,W) float32 in [0,1]; label (N,) int64; logits (N,K); energy (N,) nats, lower =
likelier; joint_energy -f(x)[y]; score -dE/dx; eps and step_size in pixel units of [0,1]; p_value; suspicious; bundle;
engine; preset; run.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebjdat_serve.classifier import Classifier, load

# From its import on, ONNX Runtime writes a device id into HOME and reports to its maker, unless this is set before. 0 turns it on again.
os.environ["ORT_DISABLE_TELEMETRY"] = os.environ.get("ORT_DISABLE_TELEMETRY") or "1"

__version__ = "0.1.0"
__all__ = ["Classifier", "load"]


def __getattr__(name: str) -> Any:
    """Return ``load`` or ``Classifier``, whose module is imported only then: an import of the package takes no time."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ebjdat_serve import classifier

    return getattr(classifier, name)
