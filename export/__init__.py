"""Export of a bundle's weights to ONNX graphs; never imports training."""

import ebjdat_serve  # noqa: F401  it turns telemetry off, before anything here imports ONNX Runtime
