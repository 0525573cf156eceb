"""What an image promises is judged before any pixel is made: all formats, all limits, any bytes, in bounded time."""

import contextlib
import io
import os
import struct
import time
import zlib
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.hostile_images import (
    avif_that_lies,
    chunk,
    directory,
    encoded,
    exif_of_numbers,
    jpeg_of_scans,
    jpeg_of_segments,
    jpeg_of_tags,
    jpeg_with,
    png,
    png_of_tags,
    png_of_texts,
    tiff,
    webp,
    webp_of_tags,
)
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding import judge as judging
from ebjdat_serve.decoding import small
from ebjdat_serve.decoding.bmff import LONGEST_BRANDS
from ebjdat_serve.decoding.exif import exif_work
from ebjdat_serve.decoding.header import Header, Limits, Steps
from ebjdat_serve.decoding.judge import accepted, format_of, judge
from ebjdat_serve.errors import InvalidImage

LIMITS = Limits(jpeg_draft=True)
HEIC = find_spec("pillow_heif") is not None
needs_heic = pytest.mark.skipif(not HEIC, reason="the extra [heic] is not installed")


def colour(size=(53, 37), mode="RGB"):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    return picture.convert("RGB").quantize(200) if mode == "P" else picture.convert(mode)


HOSTILE = {
    "a WebP of 46 bytes": (webp(16_000, 2_500), "16000 x 2500 pixels; the limit is 25000000"),
    "a PNG of one column": (png(1, 40_000_000), "1 x 40000000 pixels; the limit is 65535 a side"),
    "a JPEG of 8,000 scans": (jpeg_of_scans(8000), "too many scans, more than 64"),
    "a JPEG of segments after its scan": (jpeg_of_segments(2**18), "too many segments, or bytes between them, more than 1000"),
    "a PNG of sixty texts": (png_of_texts(60), "too many compressed texts or profiles, more than 16"),
}


RATIONALS = exif_of_numbers(5, 8, 8000)  # as many as a segment of a JPEG holds: .1 s of Pillow's time


def box(name, body):
    return struct.pack(">I", 8 + len(body)) + name + body


def avif_of(*boxes):
    """Return an AVIF of 8 x 8 pixels, with no pixels, and of boxes about its items."""
    size = box(b"iprp", box(b"ipco", box(b"ispe", struct.pack(">III", 0, 8, 8))))
    return box(b"ftyp", b"avif\0\0\0\0avifmif1") + box(b"meta", bytes(4) + box(b"pitm", struct.pack(">IH", 0, 1)) + size + b"".join(boxes))


def properties_of_items(items, places):
    """Return a box that gives so many items so many properties each."""
    return box(b"ipma", struct.pack(">II", 0, items) + (struct.pack(">HB", 1, places) + b"\1" * places) * items)


def mpf(n):
    """Return a list of ``n`` pictures."""
    return b"II*\0\x08\0\0\0" + directory([(0xB001, 4, 1, n), (0xB002, 7, 16 * n, 40)]).ljust(32, b"\0") + bytes(16 * n)


def big_tiff(n):
    """Return a BigTIFF of 8 x 8 pixels with ``n`` ratios for its resolution."""
    tags = [
        (256, 4, 1, 8),
        (257, 4, 1, 8),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (279, 4, 1, 64),
        (282, 5, n, 400),
    ]
    head = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)) + b"".join(struct.pack("<HHQQ", *tag) for tag in tags)
    return head.ljust(400, b"\0") + struct.pack("<II", 72, 1) * n


def jpeg_of_two_parts(exif):
    """Return a JPEG whose EXIF comes in two segments; the second has all but the start of its first directory's numbers."""
    return jpeg_with((0xE1, b"Exif\0\0" + exif[:150]), (0xE1, b"Exif\0\0" + exif[150:]))


COSTLY = {
    "a PNG of 252 kB of tags": png_of_tags(21_000, 4),
    "a PNG of tags with one value": png_of_tags(30_000, 130_000),
    "a WebP of tags with one value": webp_of_tags(30_000, 130_000),
    "a JPEG of tags with one value": jpeg_of_tags(4000, 12_000),
    "a JPEG of a list of pictures": jpeg_of_tags(4000, 12_000, b"\xff\xe2", b"MPF\0"),
    "a PNG of large tags": png_of_tags(120, 500_000),
    "a TIFF of a long palette": tiff([(320, 3, 60_000, 400)], bytes(120_000)),
    "a TIFF whose tags share numbers": tiff([(tag, 5, 1000, 400) for tag in (274, 282, 283, 296)], struct.pack("<II", 72, 1) * 1000),
    "a TIFF of EXIF": tiff([(0x8769, 4, 1, 400)], directory([(0x9286, 5, 1000, 420)]).ljust(20) + struct.pack("<II", 72, 1) * 1000),
    "a BigTIFF of numbers": big_tiff(1000),
    "a TIFF of a directory that is the first of two": tiff(
        [(0x8769, 4, 2, 400)], struct.pack("<II", 420, 0).ljust(20) + directory([(0x9286, 5, 1000, 440)]).ljust(20) + bytes(8000)
    ),
    "a PNG of ratios": png(40, 40, chunk(b"eXIf", RATIONALS), pixels=bytes(40 * 121)),
    "a PNG of ratios far behind": png(
        40, 40, chunk(b"eXIf", b"II*\0" + struct.pack("<I", 140_000) + bytes(139_992) + RATIONALS[8:]), pixels=bytes(40 * 121)
    ),
    "a PNG of EXIF in a text": png(
        40, 40, chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + RATIONALS.hex().encode()))
    ),
    "a PNG of doubles in a further directory": png(40, 40, chunk(b"eXIf", exif_of_numbers(12, 8, 8000, 0x8769)), pixels=bytes(40 * 121)),
    "a WebP of ratios": encoded(Image.new("RGB", (64, 64)), "WEBP", exif=RATIONALS),
    "a JPEG of ratios": jpeg_with((0xE1, b"Exif\0\0" + RATIONALS)),
    "a JPEG of ratios, named twice": jpeg_with((0xE1, b"Exif\0\0Exif\0\0" + RATIONALS)),
    "a JPEG of ratios in two parts": jpeg_of_two_parts(RATIONALS),
    "a JPEG of shorts": jpeg_with((0xE1, b"Exif\0\0" + exif_of_numbers(3, 2, 30_000))),
    "a JPEG of Photoshop resources": jpeg_with(*[(0xED, b"Photoshop 3.0\0" + (b"8BIM\4\4" + bytes(6)) * 5000)] * 8),
    "a JPEG of quantization tables": jpeg_with(*[(0xDB, (b"\0" + b"\1" * 64) * 1000)] * 7),
    "a JPEG of many pictures": jpeg_with((0xE2, b"MPF\0" + mpf(3900))),
    "an AVIF larger than it says": avif_that_lies((4900, 4900), (64, 64)),
    "a TIFF that holds a JPEG": encoded(colour(), "TIFF", compression="jpeg"),
    "a PNG of tiny chunks of pixels": png(200, 200, chunk(b"IDAT", bytes(256)) * 1900),
    "a PNG of texts": png_of_texts(16),
    "a PNG of bytes that make no pixels": png(8, 8, chunk(b"IDAT", os.urandom(300_000))),
    "a TIFF of tiles that are the same bytes, mostly beyond it": tiff(
        [(322, 4, 1, 16), (323, 4, 1, 60_000), (324, 4, 20, 400), (325, 4, 20, 480)], bytes(200)
    ),
}
"""What costs a decoder more than its pixels: files of a few kilobytes that are accepted, and took up to .6 s of processor time."""


@pytest.mark.parametrize("name", COSTLY)
def test_what_costs_more_than_its_pixels_is_kept_from_small_images(name):
    data = COSTLY[name]
    assert len(data) <= small.SMALL_BYTES
    header = judge(data, Input(32, 32), LIMITS)
    assert header.pixels <= small.SMALL_WORK
    assert not header.sure or header.work > small.SMALL_WORK


def test_exif_as_cameras_write_it_costs_nothing_to_speak_of():
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0x9000 + i: b"a" * 500 for i in range(60)})
    exif.get_ifd(0x8825).update(dict.fromkeys((1, 3, 16, 29), "a" * 20))
    for kind in ("PNG", "JPEG", "WEBP"):
        plain, tagged = (judge(encoded(colour(), kind, **options), Input(32, 32), LIMITS) for options in ({}, {"exif": exif}))
        assert plain.work <= tagged.work <= small.SMALL_WORK // 2
    for rubbish in (b"", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0", os.urandom(300)):
        assert exif_work(rubbish, Steps()) == 0


def test_the_webp_has_46_bytes():
    assert len(webp(16_000, 2_500)) == 46
    with Image.open(io.BytesIO(webp(160, 25))) as picture:
        assert picture.size == (160, 25)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_broke_the_server_is_refused_by_its_header(name):
    data, said = HOSTILE[name]
    began = time.process_time()
    with pytest.raises(InvalidImage, match=said):
        judge(data, Input(32, 32), LIMITS)
    assert time.process_time() - began < 0.1


CASES = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "RGB", {"save_all": True, "append_images": [colour()] * 2}),
    *(("JPEG", mode, {"progressive": progressive}) for mode in ("L", "RGB", "CMYK") for progressive in (False, True)),
    ("JPEG", "RGB", {"restart_marker_blocks": 1}),
    *(("JPEG", "RGB", {"subsampling": subsampling}) for subsampling in (0, 1, 2)),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (False, True)),
    ("WEBP", "RGB", {"save_all": True, "append_images": [colour().rotate(90)] * 2}),
    *(("GIF", mode, {}) for mode in ("L", "P", "RGB")),
    ("GIF", "P", {"save_all": True, "append_images": [colour().rotate(90)] * 2, "comment": b"a" * 1000}),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
    *(("TIFF", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"big_tiff": True}),
    ("TIFF", "RGB", {"save_all": True, "append_images": [colour()] * 2}),
    *(("AVIF", mode, {"speed": 10}) for mode in ("L", "RGB", "RGBA")),
    ("AVIF", "RGB", {"speed": 10, "subsampling": "4:4:4"}),
    ("AVIF", "RGB", {"speed": 10, "save_all": True, "append_images": [colour().rotate(90)] * 2}),
]


@pytest.mark.parametrize(("kind", "mode", "options"), CASES, ids=lambda value: str(value)[:40])
def test_what_pillow_writes_is_judged_as_pillow_reads_it(kind, mode, options):
    data = encoded(colour(mode=mode), kind, **options)
    header = judge(data, Input(32, 32), LIMITS)
    with Image.open(io.BytesIO(data)) as picture:
        assert (header.format, header.width, header.height) == (picture.format, *picture.size)
    assert header.memory(Input(32, 32), LIMITS) < 32 * 2**20


@needs_heic
def test_heic_is_judged():
    import pillow_heif

    pillow_heif.register_heif_opener()
    data = encoded(colour((64, 128)), "HEIF")
    header = judge(data, Input(32, 32), LIMITS)
    assert (header.format, header.width, header.height) == ("HEIC", 64, 128)


def test_heic_without_its_extra_names_it(monkeypatch):
    monkeypatch.setattr(judging, "reads_heic", lambda: False)
    with pytest.raises(InvalidImage, match=r"a HEIC.*pip install 'ebjdat-serve\[heic\]'"):
        judge(struct.pack(">I", 24) + b"ftypheic" + bytes(4) + b"mif1heic", Input(32, 32), LIMITS)
    assert "HEIC" not in accepted()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"0 bytes"),
        (bytes(LIMITS.max_bytes + 1), f"has {LIMITS.max_bytes + 1} bytes; the limit is {LIMITS.max_bytes}"),
        (b"hello", "not an image this server reads; send PNG, JPEG"),
        (b"%PDF-1.7", "it is a PDF; send PNG, JPEG"),
        (b"  <svg xmlns=''/>", "it is an SVG"),
        (b"\xff\x0a" + bytes(30), "it is JPEG XL"),
        (b"iVBORw0KGgoAAAANSUhEUg", "it is base64 of a PNG; send its bytes"),
        (struct.pack(">I", 24) + b"ftypisom" + bytes(4) + b"isommp42", "it is a video"),
        (png(8, 8, bits=7), "colour type 2 with 7 bits does not exist"),
        (png(0, 8), "it has no pixels"),
        (png(6000, 6000), "6000 x 6000 pixels; the limit is 25000000"),
        (png(8, 8, *[chunk(b"tEXt", b"a\0b")] * 1001), "too many chunks that are no pixels"),
        (png(8, 8, *[chunk(b"IDAT", b"a")] * 1001), "too many chunks that are no pixels, or are tiny"),
        (png(8, 8, *[chunk(b"IDAT", bytes(256))] * 20_001), "too many chunks of pixels, more than 20000"),
        (png(8, 8, *[chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"b"))] * 17), "too many compressed texts"),
        (encoded(colour(), "JPEG")[:20], "no frame and scan"),
        (b"\xff\xd8\xff" + bytes(2000), "too many segments, or bytes between them"),
        (b"GIF89a" + bytes(7) + b"!\xfe" + b"\x01a" * 2000, "too many blocks before its first frame"),
        (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 8, 8, 1, 8, 1) + bytes(30), r"compressed \(RLE8\); send it uncompressed"),
        (b"BM" + bytes(12) + struct.pack("<IiiHHIIIIII", 40, 8, 8, 1, 8, 0, 0, 0, 0, 257, 0), "257 colours, and pixels of 8 bits"),
        (b"II*\0\x08\0\0\0\xff\xff" + bytes(12 * 65535), "too many tags"),
        (tiff([(320, 3, 200_000, 8)]), "its palette has more than 196608 numbers"),
        (encoded(Image.new("F", (8, 8)), "TIFF"), "samples of 32 bits, signed or of floating point"),
        (encoded(colour(), "TIFF", compression="zstd"), "compression 50000; send none"),
        (b"\0\0\0\x14ftypavif\0\0\0\0avif" + b"\0\0\0\x08free" * 1001, "too many boxes"),
        (b"\0\0\0\x14ftypavif\0\0\0\0avif" + b"".join(struct.pack(">I", 800 - 8 * i) + b"moov" for i in range(100)), "nested too deep"),
        (avif_of(properties_of_items(100, 200)), "too many properties of items, more than 20000"),
        (avif_of(box(b"iinf", struct.pack(">IH", 0, 1025))), "too many items, more than 1024"),
        (struct.pack(">I", LONGEST_BRANDS + 4) + b"ftypavif" + bytes(LONGEST_BRANDS), "not an image this server reads"),
        (webp(100, 100)[:20] + bytes(26), "is not its canvas|has no frame|no signature"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals_name_what_arrived_and_the_limit_or_the_fix(data, said):
    with pytest.raises(InvalidImage, match=said):
        judge(data, Input(32, 32), LIMITS)


def test_an_avif_may_have_as_many_properties_items_and_brands_as_its_limits_say():
    items = box(b"iinf", struct.pack(">IH", 0, 1024))
    assert judge(avif_of(properties_of_items(100, 199), items), Input(32, 32), LIMITS).pixels == 64
    assert format_of(struct.pack(">I", LONGEST_BRANDS) + b"ftypavif" + bytes(LONGEST_BRANDS)) == "AVIF"


def test_a_frame_other_than_its_canvas_is_refused():
    data = bytearray(webp(100, 100))
    data[24:27] = struct.pack("<I", 9_999)[:3]
    with pytest.raises(InvalidImage, match="its frame of 100 x 100 is not its canvas of 10000 x 100"):
        judge(bytes(data), Input(32, 32), LIMITS)


def test_what_comes_after_the_end_of_an_image_does_not_count():
    trailer = b"\xff\xda\x00\x02" * 10_000  # such as the film of a moving photo
    assert judge(encoded(colour(), "JPEG") + trailer, Input(32, 32), LIMITS).width == 53
    assert judge(encoded(colour(), "PNG") + chunk(b"tEXt", b"") * 2000, Input(32, 32), LIMITS).width == 53


def test_a_scan_of_some_components_keeps_all_coefficients():
    whole = encoded(colour(), "JPEG", progressive=False)
    assert judge(whole, Input(32, 32), LIMITS).fixed == 0
    part = bytearray(whole)
    part[part.rindex(b"\xff\xda") + 4] = 1
    assert judge(bytes(part), Input(32, 32), LIMITS).fixed > 0
    assert judge(encoded(colour(), "JPEG", progressive=True), Input(32, 32), LIMITS).fixed > 0


def test_a_jpeg_may_be_larger_where_draft_is_allowed():
    big = Header("JPEG", 8064, 6048)
    big.check(Input(32, 32), LIMITS)
    assert big.scale(Input(32, 32), LIMITS) == 8
    assert big.scale(Input(224, 224), LIMITS) == 2
    with pytest.raises(InvalidImage, match="8064 x 6048 pixels; the limit is 25000000"):
        big.check(Input(32, 32), replace(LIMITS, jpeg_draft=False))
    with pytest.raises(InvalidImage, match="the limit is 25000000"):
        big.check(Input(1024, 1024), LIMITS)  # too little would be left of it
    for one in (Header("JPEG", 1600, 1200), Header("PNG", 8064, 6048)):
        assert one.scale(Input(32, 32), LIMITS) == 1


def test_a_decode_that_takes_too_much_memory_is_refused():
    with pytest.raises(InvalidImage, match=r"take about \d+ MiB to decode; the limit is 448"):
        Header("JPEG", 5000, 5000, fixed=440 * 2**20).check(Input(32, 32), LIMITS)


START = encoded(colour(), "JPEG")[:-2]
LONG = {
    "stuffed bytes": START + b"\xff\x00" * 2**22,
    "fill": START + b"\xff" * 2**23,
    "restarts": START + b"\xff\xd0" * 2**22,
    "noise": START + os.urandom(2**20).replace(b"\xff", b"\xff\x00") * 8,
    "long gaps": (START + (bytes(8000) + b"\xff\xfe\x00\x02\xff\xc4\x00\x02\xff\xdd\x00\x02") * 900)[: 2**23],
    "tiny chunks": png(8, 8, chunk(b"IDAT", bytes(256)) * 30_000),
    "tiny frames": b"GIF89a" + bytes(7) + (b"," + bytes(10)) * 2**19,
}


@pytest.mark.parametrize("name", LONG)
def test_any_bytes_take_bounded_time(name):
    data, best = LONG[name], 1.0
    for _ in range(3):
        began = time.process_time()
        with contextlib.suppress(InvalidImage):  # it may be refused, but soon
            judge(data, Input(32, 32), LIMITS)
        best = min(best, time.process_time() - began)
    assert best < 0.010 * len(data) / 2**20


SEEDS = [encoded(colour(mode=mode), kind, **options) for kind, mode, options in CASES]
edits = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=12)


@given(st.sampled_from(SEEDS), edits, st.booleans(), st.integers(0, 10**6))
def test_hostile_bytes_raise_nothing_but_invalid_image(seed, edits, early, cut):
    data = bytearray(seed)
    for place, value in edits:
        data[place % min(len(data), 400 if early else len(data))] = value
    del data[max(1, len(data) - cut % 700) :]
    try:
        header = judge(bytes(data), Input(16, 16), LIMITS)
    except InvalidImage:
        return
    assert 0 < header.pixels <= LIMITS.max_jpeg_pixels
    assert 0 < header.memory(Input(16, 16), LIMITS) <= LIMITS.max_memory


MAGIC = [
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"RIFF\xff\xff\xff\x7fWEBP",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0+",
    b"\0\0\0\x14ftypavif\0\0\0\0avif",
]


@given(st.sampled_from(MAGIC), st.binary(max_size=600))
def test_rubbish_behind_a_signature_raises_nothing_but_invalid_image(magic, rest):
    assert format_of(magic) in accepted()
    try:
        judge(magic + rest, Input(16, 16), LIMITS)
    except InvalidImage as error:
        assert str(error)
