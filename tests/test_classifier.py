"""``ebjdat_serve.load``: what it answers is what a server answers of the same bytes."""

import base64
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

import ebjdat_serve
from ebjdat_serve.errors import BundleError, EbjdatError, InvalidImage
from ebjdat_serve.server.settings import SHIPPED
from tests.classifiers import NO_GRADIENT, NO_PRIOR, images, write
from tests.conftest import HTTP, ROOT


@pytest.fixture(scope="module")
def model():
    return ebjdat_serve.load(SHIPPED, device="cpu", threads=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return ebjdat_serve.load(write(tmp_path_factory.mktemp("tiny") / "bundle", output="probabilities", features=False).path)


@pytest.fixture(scope="module")
def jpeg():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    Image.fromarray(images(1, (1500, 1700), 4)[0]).save(buffer, "JPEG", exif=exif)  # larger than what is decoded at full size
    return buffer.getvalue()


def told(answer):
    return answer.model_dump(mode="json", exclude_unset=True)


def test_it_classifies_as_over_http(live, model, picture, jpeg):
    for content in (picture, jpeg):
        assert told(model.classify(content)) == HTTP.post(f"{live.url}/classify", content=content).json()
    unasked = model.classify(picture)
    assert (unasked.reach_score, unasked.reach_p_value, unasked.stable) == (None, None, None)
    several = [picture, jpeg, picture]
    encoded = [base64.b64encode(one).decode() for one in several]
    assert told(model.classify(several)) == HTTP.post(f"{live.url}/classify", json={"images": encoded}).json()


def test_it_checks_explains_and_generates_as_over_http(live, model, picture):
    checked = HTTP.post(f"{live.url}/classify?check=reach&radius=0.02", content=picture).json()
    assert told(model.classify(picture, check="reach", radius=0.02)) == checked
    query = {"to": "dog", "norm": "linf", "radius": 0.2, "format": "json"}
    explained = HTTP.post(f"{live.url}/explain", params=query, content=picture).json()
    assert told(model.explain(picture, to="dog", norm="linf", radius=0.2)) == explained
    drawn = HTTP.get(f"{live.url}/generate?class=cat&n=2&seed=5&steps=3&format=json").json()
    assert told(model.generate("cat", 2, 5, steps=3)) == drawn


def test_an_image_is_bytes_a_path_pixels_or_of_pillow(model, picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture)
    expected = model.classify(picture)
    opened = Image.open(tmp_path / "a.png")
    for image in (bytearray(picture), tmp_path / "a.png", str(tmp_path / "a.png"), opened, np.asarray(opened)):
        assert model.classify(image) == expected
    assert model.classify(opened.convert("CMYK")).label == expected.label
    assert model.classify((picture, opened)).results == 2 * [type(model.classify([picture]).results[0])(**told_row(expected))]
    many = model.classify(70 * [picture]).results
    assert len(many) == 70
    assert many[69].probability == pytest.approx(expected.probability, abs=1e-5)


def told_row(answer):
    return {name: value for name, value in vars(answer).items() if name in answer.model_fields_set and name not in ("alpha", "model")}


def test_pillow_s_orientation_counts(model, jpeg):
    small = Image.open(io.BytesIO(jpeg)).resize((40, 30))
    small.info.clear()
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    small.save(buffer, "PNG", exif=exif)
    assert model.classify(Image.open(buffer)) == model.classify(buffer.getvalue())


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"no image", "not an image this server reads"),
        ("nowhere.png", r"'nowhere.png' cannot be read: No such file"),
        (np.zeros((4, 4, 3)), r"an array must be uint8 .* not float64 of \(4, 4, 3\)"),
        (7, "an image must be bytes, a path, an array or a Pillow image, not int"),
    ],
)
def test_what_is_no_image_is_said_with_its_place(model, picture, image, said):
    with pytest.raises(InvalidImage, match=said):
        model.classify(image)
    with pytest.raises(InvalidImage, match=r"images\[1\]: " + said) as refused:
        model.classify([picture, image])
    assert refused.value.index == 1


def test_wrong_arguments_are_said_as_over_http(model, picture):
    with pytest.raises(EbjdatError, match="to 'unicorn' is unknown"):
        model.explain(picture, to="unicorn")
    with pytest.raises(EbjdatError, match="n must be 1 to 64, not 65"):
        model.generate(3, 65)
    with pytest.raises(EbjdatError, match="an empty list"):
        model.classify([])
    with pytest.raises(EbjdatError, match="radius must be 1e-6 to 1"):
        model.classify(picture, check="reach", radius=2)
    with pytest.raises(EbjdatError, match="radius must be 1e-6 to 1, not 'x'"):
        model.classify(picture, check="reach", radius="x")
    with pytest.raises(EbjdatError, match="radius is of check='reach'"):  # as HTTP refuses it
        model.classify(picture, radius=0.01)
    for wrong in ("scale", "radius", "probability"):
        with pytest.raises(EbjdatError, match=f"{wrong}: a number is needed, not true or false"):
            model.explain(picture, **{wrong: True})
    with pytest.raises(TypeError, match="trust takes a list of paths"):
        ebjdat_serve.load(SHIPPED, trust="key.pub.pem")


def test_what_a_model_lacks_is_none_or_said(tiny, picture):
    answer = tiny.classify(picture)
    assert (answer.energy, answer.p_value, answer.suspicious, answer.decision) == (None, None, None, None)
    assert answer.suspicion == pytest.approx(-np.log(answer.probability), rel=1e-4)
    with pytest.raises(EbjdatError, match=rf"tiny@1 explains nothing: {NO_GRADIENT}"):
        tiny.explain(picture)
    with pytest.raises(EbjdatError, match=rf"tiny@1 draws nothing: {NO_PRIOR}"):
        tiny.generate(0)
    with pytest.raises(EbjdatError, match="not have"):
        tiny.classify(picture, check="reach")
    assert (tiny.name, tiny.labels) == ("tiny@1", ["ant", "bee", "cow", "dog"])


def test_threads_share_one(model, picture):
    expected, other = model.classify(picture), model.generate("cat", seed=1, steps=2)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda i: model.classify(picture) if i % 2 else model.generate("cat", seed=1, steps=2), range(12)))
    assert all(answer == (expected if i % 2 else other) for i, answer in enumerate(answers))


def test_a_bundle_that_no_server_serves_is_refused(tmp_path):
    with pytest.raises(BundleError):
        ebjdat_serve.load(tmp_path)
    for none in (None, b"bundle", 3):
        with pytest.raises(TypeError, match=f"load takes the path of a bundle or a store, .* not {none!r}"):
            ebjdat_serve.load(none)
    with pytest.raises(AttributeError, match="has no attribute 'lod'"):
        ebjdat_serve.lod  # noqa: B018


def test_the_package_is_imported_in_no_time_and_serves_without_torch_and_litserve(picture, tmp_path):
    (tmp_path / "a.png").write_bytes(picture)
    code = (
        "import sys, ebjdat_serve; assert not {'numpy', 'fastapi', 'onnxruntime'} & set(sys.modules); "
        f"ebjdat_serve.load({str(write(tmp_path / 'bundle').path)!r}).classify({str(tmp_path / 'a.png')!r}); "
        "assert not {'torch', 'litserve', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_answer_that_is_not_finite_is_said_with_its_place(model, picture, monkeypatch):
    real = model._model.engine.classify

    def overflowing(image):
        found = real(image)
        found.logits[-1] = np.nan
        return found

    monkeypatch.setattr(model._model.engine, "classify", overflowing)
    with pytest.raises(EbjdatError, match=r"answer on images\[1\] is not finite"):
        model.classify([picture, picture])
    with pytest.raises(EbjdatError, match="answer on the image is not finite"):
        model.classify(picture)


def test_a_check_that_is_none_is_refused(model, picture):
    with pytest.raises(EbjdatError, match="check must be 'none' or 'reach', not 'rech'"):
        model.classify(picture, check="rech")


def test_pixels_that_pillow_cannot_give_are_refused(model, monkeypatch):
    closed = Image.new("RGB", (4, 4))
    closed.close()
    for image, said in ((closed, "does not give"), (Image.new("F", (4, 4)), "what is white"), ("a\0b", "cannot be read")):
        with pytest.raises(InvalidImage, match=said):
            model.classify(image)
    with monkeypatch.context() as patch:  # told before 3.6 GB are copied and encoded
        patch.setattr(np, "ascontiguousarray", lambda _: pytest.fail("it is copied"))
        with pytest.raises(InvalidImage, match="60000 x 60000 pixels; the limit is"):
            model.classify(np.broadcast_to(np.uint8(3), (60_000, 60_000)))
    deep = Image.fromarray(np.full((32, 32), 40_000, np.int32))
    assert model.classify(deep) == model.classify(Image.fromarray(np.full((32, 32), 40_000, np.uint16)))
