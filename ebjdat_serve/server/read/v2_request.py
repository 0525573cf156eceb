"""The JSON of an inference request of the Open Inference Protocol v2, judged before any image of it is read."""

import math
from typing import Any

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.settings import Settings
from ebjdat_serve.server.v2_protocol import BYTES, INPUT, UINT8, InferRequest, Wanted

SHAPES = f"{INPUT} must be {BYTES} of shape [N], encoded images, or {UINT8} of shape [N, H, W, 3]"
MAX_ID, MAX_OUTPUTS = 256, 32
"""Characters of an id, and outputs that a request may list."""
MAX_SIDE = 65_535
"""Pixels of a side of an array."""


def infer_request(document: Any, after: int, settings: Settings) -> InferRequest:
    """Return what the JSON ``document`` of a request asks, which ``after`` bytes follow. Raises Problem 400."""
    request = as_object(document, "the request")
    request_id = request.get("id")
    if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= MAX_ID):
        raise Problem(400, f"id must be a string of at most {MAX_ID} characters")
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or as_object(inputs[0], "inputs[0]").get("name") != INPUT:
        raise Problem(400, f"inputs must be a list of one input, named {INPUT}")
    (given,) = inputs
    if given.get("datatype") not in (BYTES, UINT8):
        raise Problem(400, f"{SHAPES}, not {str(given.get('datatype'))[:20]}")
    shape = shape_of(given.get("shape"), given["datatype"], settings)
    parameters = parameters_of(given, f"input {INPUT}")
    size, data = parameters.get("binary_data_size"), given.get("data")
    if size is None and data is None:
        raise Problem(400, f"{INPUT} has neither data nor a parameter binary_data_size")
    if size is not None and (data is not None or type(size) is not int):
        raise Problem(400, "binary_data_size must be a whole number, and an input that has it has no data")
    if after != (size or 0):
        raise Problem(400, f"{after} bytes follow the JSON, and binary_data_size is {str(size)[:20]}")
    if size is not None and given["datatype"] == UINT8 and size != math.prod(shape):
        raise Problem(400, f"{INPUT} has {size} bytes, and its shape {list(shape)} asks for {math.prod(shape)}")
    binary = flag(parameters_of(request, "the request"), "binary_data_output", default=False)
    return InferRequest(request_id, given["datatype"], shape, data, size or 0, outputs_of(request.get("outputs"), binary), binary)


def shape_of(value: Any, datatype: str, settings: Settings) -> tuple[int, ...]:
    """Return the shape of the input. Raises Problem 400."""
    if not isinstance(value, list) or len(value) > 4 or not all(type(one) is int and one > 0 for one in value):
        raise Problem(400, f"{SHAPES}; shape must be a list of whole numbers above 0")
    right = value[1:] in ([], [1]) if datatype == BYTES else len(value) == 4 and value[3] == 3
    if not value or not right:
        raise Problem(400, SHAPES)
    if value[0] > settings.max_images:
        raise Problem(400, f"a request may have {settings.max_images} images (serve --max-images)")
    if max(value) > MAX_SIDE or math.prod(value[:3]) > settings.max_pixels:
        raise Problem(400, f"images may have {settings.max_pixels} pixels in all (serve --max-pixels) and {MAX_SIDE} a side")
    return tuple(value)


def outputs_of(value: Any, binary: bool) -> tuple[Wanted, ...] | None:
    """Return the outputs that are asked for, None for all. Raises Problem 400."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or len(value) > MAX_OUTPUTS:
        raise Problem(400, f"outputs must be a list of at most {MAX_OUTPUTS}")
    found = []
    for place, one in enumerate(value):
        name = as_object(one, f"outputs[{place}]").get("name")
        if not isinstance(name, str):
            raise Problem(400, f"outputs[{place}] needs a name")
        parameters = parameters_of(one, f"output {name[:40]}")
        if parameters.get("classification"):
            raise Problem(400, "the classification extension is not offered: ask for the outputs label, class or probabilities")
        found.append(Wanted(name, flag(parameters, "binary_data", default=binary)))
    if len({one.name for one in found}) < len(found):
        raise Problem(400, "an output may be asked for once")
    return tuple(found)


def parameters_of(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Return the parameters of a request, an input or an output; those that mean nothing here are ignored. Raises Problem 400."""
    parameters = value.get("parameters")
    found = {} if parameters is None else as_object(parameters, f"parameters of {what}")
    if "shared_memory_region" in found:
        raise Problem(400, "shared memory is not offered: send the data")
    return found


def flag(parameters: dict[str, Any], name: str, *, default: bool) -> bool:
    """Return a parameter that is true or false. Raises Problem 400."""
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Problem(400, f"{name} must be true or false")
    return value


def as_object(value: Any, what: str) -> dict[str, Any]:
    """Return a JSON object. Raises Problem 400."""
    if not isinstance(value, dict):
        raise Problem(400, f"{what} must be a JSON object")
    return value
