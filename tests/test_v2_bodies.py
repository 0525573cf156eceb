"""Requests and answers of the Open Inference Protocol v2, without a server: every form of a body, hostile ones, every form of an answer."""

import asyncio
import base64
import gzip
import io
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from fastapi import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ebjdat_serve.contract import Input
from ebjdat_serve.pixels import decode
from ebjdat_serve.server.answer.v2_tensors import OUTPUTS, chosen, compressed, encode, offered
from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import BodyMemory
from ebjdat_serve.server.read.uploads import SMALL_DOCUMENT
from ebjdat_serve.server.read.v2_body import InferBody, open_infer, tiff_header
from ebjdat_serve.server.read.v2_json import LONG, NUMBERS_SLICE
from ebjdat_serve.server.read.v2_path import plain
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.server.v2_protocol import HEADER_LENGTH, InferRequest, Wanted
from tests.classifiers import images, write

RANDOM = np.random.default_rng(0)


def tensor(**changes):
    return {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"], **changes}


def document(given=None, **changes):
    return {"inputs": [given or tensor()], **changes}


def binary(about, data):
    """A body as clients send it: JSON, then the data, and its headers."""
    head = json.dumps(about).encode()
    return head + data, {HEADER_LENGTH: str(len(head))}


def elements(files):
    return b"".join(struct.pack("<I", len(one)) + one for one in files)


def read(body, headers=None, limits=None, check=lambda asked: None):
    """The images of a body, as they are given to decoders, what it asks, and how many bytes at the beginning of each were not sent."""
    limits = limits or Settings()
    pieces = [body[at : at + 2**16] for at in range(0, len(body), 2**16)] or [b""]
    scope = {"type": "http", "method": "POST", "client_name": "v2"}
    scope["headers"] = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def run():
        request, reader = Request(scope, receive), InferBody(check)
        async with open_infer(request, limits) as upload:
            found, listed = await reader.images(request, upload, limits)
            assert listed
            assert BodyMemory.used["v2"] >= sum(map(len, found))
            return [bytes(one) for one in found], reader.asked, upload.made

    try:
        return asyncio.run(run())
    finally:
        assert not BodyMemory.used


def array_of(found):
    return np.stack([np.asarray(Image.open(io.BytesIO(one))) for one in found])


FILES = [b"a", b"", bytes(range(256)) * 9, b"\xff\xd8" * 40_000]


@pytest.mark.parametrize("encoding", ["identity", "gzip", "deflate"])
@pytest.mark.parametrize("how", ["binary", "json", "binary [N, 1]", "json [N, 1]"])
def test_files_are_read_as_they_were_sent(how, encoding):
    shape = [len(FILES), 1] if "N" in how else [len(FILES)]
    if how.startswith("binary"):
        data = elements(FILES)
        body, headers = binary(document({**tensor(shape=shape, parameters={"binary_data_size": len(data)}), "data": None}), data)
    else:
        texts = [base64.b64encode(one).decode() for one in FILES]
        body, headers = json.dumps(document(tensor(shape=shape, data=[[one] for one in texts] if "N" in how else texts))).encode(), {}
    body = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}[encoding](body)
    found, asked, made = read(body, {**headers, "Content-Encoding": encoding})
    assert (found, asked.n, made) == (FILES, len(FILES), 0)


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.sampled_from(["binary", "flat", "nested", "spaced"]))
def test_arrays_are_tiffs_of_the_same_pixels(n, height, width, how):
    pixels = RANDOM.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    given = tensor(datatype="UINT8", shape=list(pixels.shape))
    if how == "binary":
        del given["data"]
        body, headers = binary(document({**given, "parameters": {"binary_data_size": pixels.nbytes}}), pixels.tobytes())
    else:
        given["data"] = pixels.ravel().tolist() if how == "flat" else pixels.tolist()
        body, headers = json.dumps(document(given), indent=1 if how == "spaced" else None).encode(), {}
    found, _, made = read(body, headers)
    assert (array_of(found) == pixels).all()
    assert b"".join(one[made:] for one in found) == pixels.tobytes()
    contract = Input(8, 6)
    assert (decode(found[0], contract) == decode(png(pixels[0]), contract)).all()


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("how", ["flat", "nested"])
def test_numbers_in_slices_and_at_once_are_the_same(how, last):
    """The longest that is parsed at once, and the shortest that is not."""
    for n in (SMALL_DOCUMENT // 24, SMALL_DOCUMENT // 20, NUMBERS_SLICE):
        pixels = RANDOM.integers(0, 256, (1, n, 2, 3), dtype=np.uint8)
        data = pixels.ravel().tolist() if how == "flat" else pixels.tolist()
        head = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape)}
        about = {"id": "7", "outputs": [{"name": "label"}]}
        given = {**head, "data": data} if last else {"data": data, **head}
        both = {**about, "inputs": [given]} if last else {"inputs": [given], **about}
        found, asked, _ = read(json.dumps(both, separators=(",", ":")).encode())
        assert (array_of(found) == pixels).all()
        assert (asked.id, asked.outputs) == ("7", (Wanted("label", False),))


NUMBERS = {"datatype": "UINT8", "shape": [1, 1, 2, 3]}
LARGE = {"datatype": "UINT8", "shape": [1, 200, 200, 3]}


def large(text):
    """A document whose array of numbers is too large to be parsed at once; ``text`` in place of the first."""
    numbers = b"%b%b" % (text, b",7" * (120_000 - 1))
    return b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,200,200,3],"data":[%b]}]}' % numbers


REFUSED = {
    "no JSON": (b"\x89PNG\r\n\x1a\n", {}),
    "nothing": (b"", {}),
    "an array": (b"[]", {}),
    "no inputs": (b"{}", {}),
    "two inputs": (json.dumps({"inputs": [tensor()] * 2}).encode(), {}),
    "another input": (json.dumps(document(tensor(name="images"))).encode(), {}),
    "an input that is a number": (b'{"inputs":[1]}', {}),
    "FP16": (json.dumps(document(tensor(datatype="FP16"))).encode(), {}),
    "FP32": (json.dumps(document(tensor(datatype="FP32", shape=[1, 2, 2, 3], data=[0.5] * 12))).encode(), {}),
    "a negative shape": (json.dumps(document(tensor(shape=[-1]))).encode(), {}),
    "two negative shapes": (json.dumps(document({**tensor(data=[1] * 6), **NUMBERS, "shape": [1, -1, -2, 3]})).encode(), {}),
    "no images": (json.dumps(document(tensor(shape=[0], data=[]))).encode(), {}),
    "a shape of true": (json.dumps(document(tensor(shape=[True]))).encode(), {}),
    "a shape of fractions": (json.dumps(document(tensor(shape=[1.0]))).encode(), {}),
    "a shape of words": (json.dumps(document(tensor(shape=["1"]))).encode(), {}),
    "no shape": (json.dumps(document(tensor(shape=[]))).encode(), {}),
    "a long shape": (json.dumps(document(tensor(shape=[1] * 20_000))).encode(), {}),
    "four channels": (json.dumps(document(tensor(datatype="UINT8", shape=[1, 2, 2, 4], data=[0] * 16))).encode(), {}),
    "channels first": (json.dumps(document(tensor(datatype="UINT8", shape=[1, 3, 2, 2], data=[0] * 12))).encode(), {}),
    "a product beyond 64 bits": (json.dumps(document(tensor(datatype="UINT8", shape=[2**32, 2**32, 2**32, 3]))).encode(), {}),
    "a product that wraps to what was sent": (json.dumps(document(tensor(datatype="UINT8", shape=[2**62, 2, 2, 3]))).encode(), {}),
    "too many pixels": (json.dumps(document(tensor(datatype="UINT8", shape=[1, 50_000, 50_000, 3], data=[1]))).encode(), {}),
    "a billion files": (json.dumps(document(tensor(shape=[10**9]))).encode(), {}),
    "fewer files than the shape": (json.dumps(document(tensor(shape=[2]))).encode(), {}),
    "more files than the shape": (json.dumps(document(tensor(data=["AAAA"] * 60_000))).encode(), {}),
    "NaN": (b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,1,1,3],"data":[NaN,1,1]}]}', {}),
    "a fraction": (json.dumps(document({**tensor(data=[1, 2, 3, 4, 5, 6.5]), **NUMBERS})).encode(), {}),
    "256": (json.dumps(document({**tensor(data=[1, 2, 3, 4, 5, 256]), **NUMBERS})).encode(), {}),
    "-1": (json.dumps(document({**tensor(data=[1, 2, 3, 4, 5, -1]), **NUMBERS})).encode(), {}),
    "a number beyond 64 bits": (json.dumps(document({**tensor(data=[1, 2, 3, 4, 5, 2**70]), **NUMBERS})).encode(), {}),
    "true": (json.dumps(document({**tensor(data=[True] * 6), **NUMBERS})).encode(), {}),
    "words": (json.dumps(document({**tensor(data=["1"] * 6), **NUMBERS})).encode(), {}),
    "a string for data": (json.dumps(document({**tensor(data="AAAAAA"), **NUMBERS})).encode(), {}),
    "ragged": (json.dumps(document({**tensor(data=[[1, 2, 3], [4, 5]]), **NUMBERS})).encode(), {}),
    "another nesting": (json.dumps(document({**tensor(data=[[1, 2], [3, 4], [5, 6]]), **NUMBERS})).encode(), {}),
    "few numbers": (json.dumps(document({**tensor(data=[1]), **NUMBERS})).encode(), {}),
    "no numbers": (json.dumps(document({**tensor(data=[]), **NUMBERS})).encode(), {}),
    "deep": (b"[" * 60_000, {}),
    "deep data": (b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,1,2,3],"data":' + b"[" * 900 + b"1" + b"]" * 900 + b"}]}", {}),
    "large: NaN": (large(b"NaN"), {}),
    "large: true": (large(b"true"), {}),
    "large: 256": (large(b"256"), {}),
    "large: a fraction": (large(b"1.5"), {}),
    "large: -1": (large(b"-1"), {}),
    "large: one more": (large(b"1,2"), {}),
    "large: one less": (large(b"")[:50] + large(b"1").replace(b"[1,7", b"[1", 1)[50:], {}),
    "large: two commas": (large(b"1,"), {}),
    "large: a long number": (large(b"1" * 10_000), {}),
    "large: no comma for long": (large(b" " * NUMBERS_SLICE * 2 + b"1"), {}),
    "large: an open bracket": (large(b"[1"), {}),
    "large: in data of files": (large(b"1").replace(b'"UINT8"', b'"BYTES"').replace(b"[1,200,200,3]", b"[1]"), {}),
    "large: brackets alone": (large(b"1").replace(b",7", b"[]"), {}),
    "large: around the data": (json.dumps(document(x=[[["y"]]] * 20_000)).encode(), {}),
    "large: many strings": (json.dumps(document(x=["y" * 20] * 20_000)).encode(), {}),
    "large: an id that never ends": (b'{"id":"' + b"a" * 10**6, {}),
    "large: quotes": (b'"' * 10**6, {}),
    "large: escaped quotes": (b'{"id":"' + b'\\"' * 10**5 + b'"}', {}),
    "a long id": (json.dumps(document(id="a" * 300)).encode(), {}),
    "an id that is a number": (json.dumps(document(id=5)).encode(), {}),
    "no base64": (json.dumps(document(tensor(data=["!"]))).encode(), {}),
    "data and binary data": (json.dumps(document(tensor(parameters={"binary_data_size": 0}))).encode(), {}),
    "shared memory": (json.dumps(document(tensor(data=None, parameters={"shared_memory_region": "a"}))).encode(), {}),
    "classification": (json.dumps(document(outputs=[{"name": "logits", "parameters": {"classification": 3}}])).encode(), {}),
    "parameters that are none": (json.dumps(document(parameters=[1])).encode(), {}),
    "binary_data of a word": (json.dumps(document(outputs=[{"name": "logits", "parameters": {"binary_data": "yes"}}])).encode(), {}),
    "an output twice": (json.dumps(document(outputs=[{"name": "logits"}] * 2)).encode(), {}),
    "an output without a name": (json.dumps(document(outputs=[{}])).encode(), {}),
    "too many outputs": (json.dumps(document(outputs=[{"name": str(i)} for i in range(33)])).encode(), {}),
    "a header of more than the body": (b"{}", {HEADER_LENGTH: "3"}),
    "a header of nothing": (b"{}", {HEADER_LENGTH: "0"}),
    "a negative header": (b"{}", {HEADER_LENGTH: "-1"}),
    "a header of another script": (b"{}", {HEADER_LENGTH: "\xb2"}),
    "a long header": (b"{}", {HEADER_LENGTH: "1" * 5000}),
    "a header that cuts the JSON": (json.dumps(document()).encode(), {HEADER_LENGTH: "20"}),
    "no gzip": (b"{}", {"Content-Encoding": "gzip"}),
    "half a gzip": (gzip.compress(json.dumps(document()).encode())[:-9], {"Content-Encoding": "gzip"}),
    "more than a gzip": (gzip.compress(json.dumps(document()).encode()) + b"x", {"Content-Encoding": "gzip"}),
    "two gzips": (gzip.compress(b"{}") * 2, {"Content-Encoding": "gzip"}),
    "a gzip as deflate": (gzip.compress(b"{}"), {"Content-Encoding": "deflate"}),
}
AFTER = {
    "an element beyond the end": (struct.pack("<I", 2**32 - 1), [1]),
    "half a length": (b"\1\0", [1]),
    "fewer elements": (elements([b"a"]), [2]),
    "more elements": (elements([b"a", b"b"]), [1]),
    "fewer bytes than the shape": (bytes(11), [1, 2, 2, 3]),
    "more bytes than the shape": (bytes(13), [1, 2, 2, 3]),
}
for told, (data, dims) in AFTER.items():
    kind = "BYTES" if len(dims) == 1 else "UINT8"
    about = {"name": "image", "datatype": kind, "shape": dims, "parameters": {"binary_data_size": len(data)}}
    REFUSED[told] = binary(document(about), data)
    REFUSED[f"{told}, and another size"] = binary(document({**about, "parameters": {"binary_data_size": len(data) + 1}}), data)
    REFUSED[f"{told}, and a size of words"] = binary(document({**about, "parameters": {"binary_data_size": str(len(data))}}), data)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_in_one_line(name):
    body, headers = REFUSED[name]
    with pytest.raises(Problem) as error:
        read(body, headers)
    assert error.value.status in (400, 422), error.value.detail
    assert "\n" not in error.value.detail
    assert 10 < len(error.value.detail) < 300


@settings(max_examples=25)
@given(st.binary(max_size=200), st.integers(-5, 250))
def test_arbitrary_bytes_are_refused(body, length):
    for headers in ({}, {HEADER_LENGTH: str(length)}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "deflate"}):
        with pytest.raises(Problem) as error:
            read(body, headers)
        assert error.value.status == 400


def test_what_inflates_beyond_the_limit_ends_there():
    limits = Settings(max_body=2**20, max_image_bytes=2**19)
    for pack, encoding in ((gzip.compress, "gzip"), (zlib.compress, "deflate")):
        bomb = pack(bytes(16 * 2**20))
        assert len(bomb) < limits.max_body // 8
        tracemalloc.start()
        with pytest.raises(Problem) as error:
            read(bomb, {"Content-Encoding": encoding}, limits)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (error.value.status, peak < 6 * 2**20) == (413, True), peak
    with pytest.raises(Problem) as error:
        read(b"", {"Content-Encoding": "br"})
    assert error.value.status == 415


def test_what_a_request_may_not_have_is_refused_before_its_images_are_read():
    def check(asked):
        raise Problem(403, "no")

    with pytest.raises(Problem, match="no"):
        read(json.dumps(document(tensor(data=["not base64"]))).encode(), check=check)


def test_paths_with_a_model_are_plain_ones():
    for path, to in (
        ("/v2/models/a", ("/v2/model", {"model_name": "a"})),
        ("/v2/models/a/infer", ("/v2/infer", {"model_name": "a"})),
        ("/v2/models/a/versions/1.b/infer", ("/v2/infer", {"model_name": "a", "model_version": "1.b"})),
        ("/v2/models/a/versions/1", ("/v2/model", {"model_name": "a", "model_version": "1"})),
        ("/v2/models/infer/ready", ("/v2/ready", {"model_name": "infer"})),
    ):
        assert plain(path) == to
    same = ("/v2", "/v2/models", "/v2/models/", "/v2/models//infer", "/v2/models/a/", "/v2/models/a/x", "/v2/models/a/versions//infer")
    for path in (*same, "/v2/models/stats", "/v2/models/a/infer/", "/v2/models/a/versions/1/versions/2/infer", "/v2/health/live"):
        assert plain(path) == (path, {})


# answers -----------------------------------------------------------------------------------------------------------


def unpacked(body, size):
    """What tritonclient makes of an answer, in its words."""
    said = json.loads(body[:size])
    at, found = size, {}
    for one in said["outputs"]:
        dtype = {"FP32": np.float32, "INT64": np.int64, "BOOL": bool, "BYTES": np.object_}[one["datatype"]]
        if (length := one.get("parameters", {}).get("binary_data_size")) is None:
            found[one["name"]] = np.array(one["data"], dtype).reshape(one["shape"])
            continue
        data, at = body[at : at + length], at + length
        if one["datatype"] == "BYTES":
            texts = []
            while data:
                n = struct.unpack("<I", data[:4])[0]
                texts.append(data[4 : 4 + n].decode())
                data = data[4 + n :]
            found[one["name"]] = np.array(texts, np.object_).reshape(one["shape"])
        else:
            found[one["name"]] = np.frombuffer(data, dtype).reshape(one["shape"])
    assert at == len(body)
    return said, found


def predictions(n, classes, *, energy=True, calibrated=True):
    f = RANDOM.normal(size=(n, classes)).astype(np.float32)
    nothing = np.full(n, np.nan)
    e = np.exp(f)
    p = RANDOM.random(n) if calibrated else nothing
    return Predictions(
        probability=e / e.sum(1, keepdims=True),
        joint_energy=-f,
        energy=-np.log(e.sum(1)) if energy else nothing.astype(np.float32),
        suspicion=f[:, 0],
        p_value=p,
        suspicious=np.nan_to_num(p, nan=1) < 0.5,
        top=np.argsort(-f, axis=1),
        why=np.zeros(n, np.int64),
        margin=f[:, 0],
        margin_p_value=nothing,
        reasons=np.empty((n, 0), bool),
    )


def asked(outputs=None, *, binary=False, request_id=None):
    return InferRequest(request_id, "BYTES", (1,), [], 0, outputs, binary)


@pytest.fixture(scope="module")
def calibrated():
    return open_bundle(SHIPPED, Settings())


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A model with neither an energy nor a calibration, and labels of other scripts."""
    bundle = write(tmp_path_factory.mktemp("bare") / "bundle", labels=("ä", "a b", '"', "雪"), output="probabilities", features=False)
    return open_bundle(bundle.path, Settings())


@settings(max_examples=12)
@given(st.integers(1, 64), st.permutations(list(OUTPUTS)), st.lists(st.booleans(), min_size=8, max_size=8), st.integers(1, 8))
def test_an_answer_is_read_as_it_was_meant(calibrated, n, names, binaries, count):
    p = predictions(n, 10)
    wanted = [Wanted(name, binary) for name, binary in zip(names[:count], binaries, strict=False)]
    body, size = encode(asked(request_id='"\n'), wanted, p, "m", calibrated)
    said, found = unpacked(body, size)
    assert (said["model_name"], said["model_version"], said["id"]) == ("m", calibrated.bundle.manifest.version, '"\n')
    expected = {
        "logits": -p.joint_energy,
        "probabilities": p.probability,
        "energy": p.energy,
        "suspicion": p.suspicion,
        "p_value": p.p_value.astype(np.float32),
        "suspicious": p.suspicious,
        "label": np.array([calibrated.labels[i] for i in p.top[:, 0]], np.object_),
        "class": p.top[:, 0],
    }
    assert list(found) == names[:count]
    for name, values in found.items():
        assert values.shape == expected[name].shape
        assert (values == expected[name]).all(), name


def test_what_a_model_lacks_is_nan_in_binary_and_absent_from_json(bare):
    p = predictions(2, 4, energy=False, calibrated=False)
    everything = chosen(asked(binary=True), bare, "full")
    _, found = unpacked(*encode(asked(), everything, p, "m", bare))
    assert np.isnan(found["energy"]).all() and np.isnan(found["p_value"]).all() and "suspicious" not in found
    assert found["label"].tolist() == [bare.labels[i] for i in p.top[:, 0]]
    in_json = chosen(asked(), bare, "full")
    _, found = unpacked(*encode(asked(), in_json, p, "m", bare))
    assert list(found) == ["logits", "probabilities", "suspicion", "label", "class"]
    assert [one.name for one in offered(bare, "full")] == ["logits", "probabilities", "energy", "suspicion", "p_value", "label", "class"]
    for name, binary in (("energy", False), ("p_value", False), ("suspicious", True), ("suspicious", False)):
        with pytest.raises(Problem, match=f"gives no {name}") as error:
            chosen(asked((Wanted(name, binary),)), bare, "full")
        assert error.value.status == 409
    assert chosen(asked((Wanted("energy", True),)), bare, "full") == [Wanted("energy", True)]


def test_the_public_profile_tells_labels_and_flags_alone(calibrated):
    assert [one.name for one in chosen(asked(), calibrated, "public")] == ["suspicious", "label", "class"]
    assert [one.name for one in offered(calibrated, "public")] == ["suspicious", "label", "class"]
    for name in ("logits", "probabilities", "energy", "suspicion", "p_value"):
        with pytest.raises(Problem, match="scope operate") as error:
            chosen(asked((Wanted("label", False), Wanted(name, True))), calibrated, "public")
        assert error.value.status == 403
    with pytest.raises(Problem, match="no output 'x'") as error:
        chosen(asked((Wanted("x", True),)), calibrated, "public")
    assert error.value.status == 400


def test_infinity_is_no_json(calibrated):
    p = predictions(1, 10)
    p.suspicion[0] = np.inf
    with pytest.raises(Problem, match="suspicion is not finite"):
        encode(asked(), [Wanted("suspicion", False)], p, "m", calibrated)
    assert unpacked(*encode(asked(), [Wanted("suspicion", True)], p, "m", calibrated))[1]["suspicion"] == np.inf


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [("", ""), ("gzip", "gzip"), ("deflate", "deflate"), ("br, gzip;q=0.5, deflate", "gzip"), ("gzip;q=0, deflate", "deflate"), ("br", "")],
)
def test_answers_are_compressed_for_who_takes_it(accepted, encoding):
    body = bytes(10_000)
    packed, said = compressed(body, accepted)
    assert said == encoding
    assert {"": bytes, "gzip": gzip.decompress, "deflate": zlib.decompress}[encoding](packed) == body
    assert compressed(b"short", accepted) == (b"short", "")


def test_the_header_of_a_tiff_is_of_its_pixels():
    pixels = images(1, (300, 7))[0]
    file = tiff_header(300, 7) + pixels.tobytes()
    assert (np.asarray(Image.open(io.BytesIO(file))) == pixels).all()
    assert LONG < SMALL_DOCUMENT
