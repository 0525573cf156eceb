"""From a bundle's weights to its graphs; never imports training."""

import ebjdat_serve  # noqa: F401  before anything here imports ONNX Runtime: it turns telemetry off
