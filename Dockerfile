# docker build -t ebjdat-serve .                         CPU
# docker build -t ebjdat-serve --build-arg EXTRA=gpu .   NVIDIA GPU (run with --gpus all); pip installs the CUDA libraries pinned in constraints.txt
# docker build … --build-arg EXTRA=gpu,tensorrt --build-arg PIP_EXTRA_INDEX_URL=…   adds TensorRT, whose libraries are on NVIDIA's own package index
# docker run -p 8000:8000 ebjdat-serve [--alpha 0.01 …]   or: docker run -e EBJDAT_ALPHA=0.01 …
FROM python:3.11-slim-bookworm AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY ebjdat_serve ebjdat_serve
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:3.11-slim-bookworm
ARG EXTRA=cpu
ARG PIP_EXTRA_INDEX_URL=
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/wheel,target=/wheel \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /wheel/*.whl)[${EXTRA}]" \
    && useradd --create-home --uid 10001 serve
# Turns off ONNX Runtime's telemetry. The package does so too; this covers other programs in the image
ENV ORT_DISABLE_TELEMETRY=1
# Settings: docs/serving.md. Options and `docker run -e` win over these; --port would leave the health check behind, EBJDAT_PORT does not
ENV EBJDAT_HOST=0.0.0.0 EBJDAT_PORT=8000
USER 10001
WORKDIR /home/serve
EXPOSE 8000
# TensorRT builds its engines at the first start: mount a volume at /home/serve/.cache to keep them
HEALTHCHECK --interval=10s --timeout=3s --start-period=15m \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ['EBJDAT_PORT']}/health\", timeout=2)"]
ENTRYPOINT ["ebjdat-serve", "serve"]
