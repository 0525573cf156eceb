"""Answers of the Open Inference Protocol v2: which outputs there are, and how they are written, in binary or in JSON."""

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.served_model import ServedModel
from ebjdat_serve.server.settings import OPERATE, Profile
from ebjdat_serve.server.v2_protocol import InferRequest, Wanted

LITTLE = {"FP32": "<f4", "INT64": "<i8", "BOOL": "?"}
"""NumPy's types of the protocol's, but for BYTES."""
LEAST_COMPRESSED = 2**10
"""Bytes of an answer, below which none is compressed."""


@dataclass(frozen=True)
class Output:
    """An output (n,) or, where ``wide``, (n, K); ``value`` gives it, for BYTES as class indices whose labels they are."""

    name: str
    datatype: Literal["FP32", "INT64", "BOOL", "BYTES"]
    value: Callable[[Predictions], NDArray[Any]]
    wide: bool = False
    public: bool = False  # whether --profile public tells it
    takes: Literal["", "energy", "calibration"] = ""

    def lacked(self, model: ServedModel) -> str:
        """Return why a model does not give the output, "" where it does."""
        if self.takes == "calibration" and model.calibration is None:
            return "it has no calibration, and no threshold is guessed"
        return model.lacks("energy") if self.takes == "energy" else ""

    def shape(self, n: int, model: ServedModel) -> list[int]:
        """Return the shape for ``n`` images, -1 for any number."""
        return [n, len(model.labels)] if self.wide else [n]


OUTPUTS = {
    one.name: one
    for one in (
        Output("logits", "FP32", lambda p: -p.joint_energy, wide=True),
        Output("probabilities", "FP32", lambda p: p.probability, wide=True),
        Output("energy", "FP32", lambda p: p.energy, takes="energy"),
        Output("suspicion", "FP32", lambda p: p.suspicion),
        Output("p_value", "FP32", lambda p: p.p_value, takes="calibration"),
        Output("suspicious", "BOOL", lambda p: p.suspicious, public=True, takes="calibration"),
        Output("label", "BYTES", lambda p: p.top[:, 0], public=True),
        Output("class", "INT64", lambda p: p.top[:, 0], public=True),
    )
}


def offered(model: ServedModel, profile: Profile) -> list[Output]:
    """Return the outputs that a client is told of: what the profile tells, and FP32 also where the model lacks it (NaN, in binary)."""
    told = [one for one in OUTPUTS.values() if one.public or profile == "full"]
    return [one for one in told if one.datatype == "FP32" or not one.lacked(model)]


def chosen(asked: InferRequest, model: ServedModel, profile: Profile) -> list[Wanted]:
    """Return the outputs to answer.

    Raises Problem: 400 for one that does not exist, 403 for one that the public profile does not tell, 409 for one that the model lacks,
    unless it is NaN in binary. Where all are asked for, those that JSON cannot hold are left out.
    """
    if asked.outputs is None:
        found = offered(model, profile)
        return [Wanted(one.name, asked.binary) for one in found if asked.binary or not one.lacked(model)]
    for wanted in asked.outputs:
        if wanted.name not in OUTPUTS:
            raise Problem(400, f"there is no output {wanted.name[:40]!r}: ask for {', '.join(OUTPUTS)}")
        output = OUTPUTS[wanted.name]
        if profile == "public" and not output.public:
            raise Problem(403, f"serve --profile public does not tell {wanted.name}: it takes a key of scope {OPERATE}")
        if reason := output.lacked(model):
            if output.datatype != "FP32":
                raise Problem(409, f"{model.name} gives no {wanted.name}: {reason}")
            if not wanted.binary:
                raise Problem(409, f"{model.name} gives no {wanted.name}: {reason}; JSON has no NaN, which it is with binary_data")
    return list(asked.outputs)


def encode(asked: InferRequest, wanted: Sequence[Wanted], predictions: Predictions, name: str, model: ServedModel) -> tuple[bytes, int]:
    """Return the body of an answer and how many bytes of it are JSON; for a thread, to which the event loop owes nothing for long.

    Rows of numbers are written one at a time: Python's JSON encoder keeps all other threads for as long as it runs.
    """
    about: dict[str, Any] = {"model_name": name, "model_version": model.bundle.manifest.version}
    if asked.id is not None:
        about["id"] = asked.id
    tensors, binary = [], []
    for one in wanted:
        output = OUTPUTS[one.name]
        values = output.value(predictions)
        head: dict[str, Any] = {"name": one.name, "datatype": output.datatype, "shape": output.shape(len(values), model)}
        if one.binary:
            data = packed(output, values, model.labels)
            tensors.append(json.dumps({**head, "parameters": {"binary_data_size": len(data)}}))
            binary.append(data)
        else:
            tensors.append(f'{json.dumps(head)[:-1]}, "data": [{listed(output, values, model.labels)}]}}')
    text = f'{json.dumps(about)[:-1]}, "outputs": [{", ".join(tensors)}]}}'.encode()
    return b"".join([text, *binary]), len(text)


def packed(output: Output, values: NDArray[Any], labels: Sequence[str]) -> bytes:
    """Return the bytes of an output: little-endian, row by row; a string after its length in 4 bytes."""
    if output.datatype == "BYTES":
        texts = [labels[index].encode() for index in values.tolist()]
        return b"".join(struct.pack("<I", len(text)) + text for text in texts)
    return values.astype(LITTLE[output.datatype]).tobytes()


def listed(output: Output, values: NDArray[Any], labels: Sequence[str]) -> str:
    """Return the elements of an output as JSON, row by row in one flat list, without its brackets. Raises Problem 422: not finite."""
    if output.datatype == "BYTES":
        return json.dumps([labels[index] for index in values.tolist()])[1:-1]
    if output.datatype != "FP32":
        return json.dumps(values.tolist())[1:-1]
    floats = values.astype(np.float32)
    if not np.isfinite(floats).all():
        raise Problem(422, f"{output.name} is not finite, which JSON does not have: ask for it with binary_data")
    return ", ".join(json.dumps(row)[1:-1] for row in floats.reshape(len(floats), -1).tolist())


def compressed(body: bytes, accepted: str) -> tuple[bytes, str]:
    """Return a body and its content encoding, "" for none: gzip or deflate (zlib's) where the client accepts it."""
    said = [one.partition(";") for one in accepted.lower().split(",")]
    names = {name.strip() for name, _, weight in said if not re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight)}
    for name, window in (("gzip", 31), ("deflate", 15)):
        if name in names and len(body) >= LEAST_COMPRESSED:
            packer = zlib.compressobj(1, wbits=window)
            return packer.compress(body) + packer.flush(), name
    return body, ""
