"""Tests of image decoding: every mode, and only InvalidImage for hostile bytes."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from benchmarks.hostile_images import chunk, png
from ebjdat_serve import pixels
from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Header, Limits
from ebjdat_serve.decoding.judge import judge
from ebjdat_serve.errors import InvalidImage


def encoded(picture, kind="PNG", **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(size=(40, 24)):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_png_of_every_mode(mode):
    out = pixels.decode(encoded(colour().convert(mode)), Input(32, 32))
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    if mode == "RGB":
        assert out.std() > 10


@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")])
def test_jpeg_and_webp(kind, mode):
    assert pixels.decode(encoded(colour().convert(mode), kind), Input(32, 32)).shape == (32, 32, 3)


def test_sixteen_bits_are_scaled_not_clipped():
    deep = Image.fromarray(np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16))
    out = pixels.decode(encoded(deep), Input(32, 32))
    assert out.min() == 0
    assert out.max() == 255
    assert abs(int(out[16, 0, 0]) - 128) <= 2


def test_a_transparent_level_of_sixteen_bits_does_not_turn_black_into_white():
    deep = Image.fromarray(np.zeros((32, 32), np.uint16))
    assert (pixels.decode(encoded(deep, transparency=256), Input(32, 32)) == 0).all()


def packed(bits, levels):
    """Return levels as samples of so many bits, the highest first."""
    return np.packbits(np.unpackbits(np.array(levels, ">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 16 - bits :]).tobytes()


def grey_png(bits, levels, *chunks):
    """Return a PNG of 32 x 32 pixels whose rows are all ``levels``."""
    return png(32, 32, *chunks, bits=bits, kind=0, pixels=(b"\0" + packed(bits, levels)) * 32)


def flat(data):
    """Return the one level of each column of a decoded image, of 32 x 32 grey pixels."""
    out = pixels.decode(data, Input(32, 32))
    assert (out == out[:1, :, :1]).all()
    return out[0, :, 0].tolist()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_each_grey_level_of_a_png_may_be_transparent(bits):
    most = 2**bits - 1
    levels = [0, most, most // 2, most // 3] * 8
    shown = [level >> 8 if bits == 16 else level * 255 // most for level in levels]
    assert flat(grey_png(bits, levels)) == shown
    for key in set(levels):
        data = grey_png(bits, levels, chunk(b"tRNS", struct.pack(">H", key)))
        assert flat(data) == [255 if level == key else grey for level, grey in zip(levels, shown, strict=True)]
    if bits in (2, 4, 8):  # of a key, the bits that samples have count
        assert flat(grey_png(bits, levels, chunk(b"tRNS", b"\xff\0"))) == [grey or 255 for grey in shown]


def test_a_transparent_level_of_16_bits_is_told_from_those_with_the_same_8():
    assert flat(grey_png(16, [0x1234, 0x1235] * 16, chunk(b"tRNS", b"\x12\x34"))) == [255, 0x12] * 16


def test_a_transparent_colour_of_8_bits_is_laid_on_white_and_one_of_16_is_refused():
    key = chunk(b"tRNS", b"\xff\1\0\2\0\3")  # whose high bits do not count
    assert (pixels.decode(png(32, 32, key, pixels=(b"\0" + b"\1\2\3" * 32) * 32), Input(32, 32)) == 255).all()
    assert (pixels.decode(png(32, 32, key, pixels=(b"\0" + b"\1\2\4" * 32) * 32), Input(32, 32)) == [1, 2, 4]).all()
    with pytest.raises(InvalidImage, match="save it with an alpha channel, or with 8 bits"):
        pixels.decode(png(32, 32, key, bits=16, pixels=(b"\0" + b"\0\1\0\2\0\3" * 32) * 32), Input(32, 32))


def grey_tiff(bits, white_is_zero, levels, order="<", orientation=1):
    """Return a TIFF of 32 x 32 pixels, whose rows are all ``levels``."""
    row = np.array(levels, f"{order}u2").tobytes() if bits == 16 else packed(bits, levels)
    tags = [(256, 32), (257, 32), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 400), (274, orientation), (278, 32)]
    tags.append((279, 32 * len(row)))
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(tags))
    body = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    return (head + body).ljust(400, b"\0") + row * 32


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_levels_of_a_tiff_are_read_as_its_photometric_interpretation_says(bits, white_is_zero):
    most = 2**bits - 1
    levels = [0, most, most // 2, most // 3] * 8
    if bits == 12 and white_is_zero:
        with pytest.raises(InvalidImage, match="samples of 12 bits in an order that is not read; save it with 16 bits"):
            pixels.decode(grey_tiff(bits, white_is_zero, levels), Input(32, 32))
        return
    shown = [level >> bits - 8 if bits > 8 else level * 255 // most for level in levels]
    assert flat(grey_tiff(bits, white_is_zero, levels)) == [255 - grey if white_is_zero else grey for grey in shown]
    turned = pixels.decode(grey_tiff(bits, white_is_zero, levels, orientation=2), Input(32, 32))[0, ::-1, 0].tolist()
    assert turned == [255 - grey if white_is_zero else grey for grey in shown]


def test_big_endian_levels_of_a_tiff_are_read_or_refused_with_the_fix():
    levels = [0, 65535, 1000, 40_000] * 8
    assert flat(grey_tiff(16, False, levels, ">")) == [level >> 8 for level in levels]
    for bits, white_is_zero in ((16, True), (12, False)):
        with pytest.raises(InvalidImage, match="save it with 16 bits, little-endian, and 0 for black"):
            pixels.decode(grey_tiff(bits, white_is_zero, [0] * 32, ">"), Input(32, 32))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_with_broken_exif_is_still_a_picture(kind):
    assert pixels.decode(encoded(colour(), kind, exif=b"Exif\x00\x00garbage"), Input(32, 32)).shape == (32, 32, 3)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert (pixels.decode(encoded(clear), Input(32, 32)) == 255).all()
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert (pixels.decode(encoded(palette, transparency=0), Input(32, 32)) == 255).all()


@pytest.mark.parametrize("deep", [False, True])
def test_exif_rotation_is_applied(deep):
    array = np.zeros((32, 32), np.uint16 if deep else np.uint8)
    array[:16] = 65535 if deep else 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the stored image is its right side
    out = pixels.decode(encoded(Image.fromarray(array), exif=exif), Input(32, 32))
    assert out[:, 20:].min() == 255
    assert out[:, :12].max() == 0


def turned(kind, mode, orientation, size=(61, 97), **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = colour(size) if mode == "RGB" else Image.merge(mode, (*colour(size).split(), colour(size).convert("L")))
    return encoded(picture, kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 10))
@pytest.mark.parametrize(
    ("kind", "mode", "options"), [("PNG", "RGBA", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {"transparency": (1, 2, 3)})]
)
def test_strips_make_the_same_bytes_as_the_whole(kind, mode, options, orientation, monkeypatch):
    data = turned(kind, mode, orientation, **options)
    with Image.open(io.BytesIO(data)) as picture:
        upright = ImageOps.exif_transpose(picture)
        if kind == "PNG":
            layer = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        expected = np.asarray(upright.convert("RGB").resize((32, 24), Image.Resampling.BOX))
    np.testing.assert_array_equal(pixels.decode(data, Input(24, 32)), expected)
    monkeypatch.setattr(pixels, "STRIP_PIXELS", 700)
    np.testing.assert_array_equal(pixels.decode(data, Input(24, 32)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_decoded_at_a_fraction_of_its_size_is_near_the_whole_and_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(colour((16, 12)).resize((1603, 1205), Image.Resampling.BICUBIC), "JPEG", exif=exif, quality=95)
    limits = Limits(jpeg_draft=True, draft_above=0)
    header = judge(data, Input(16, 24), limits)
    assert header.scale(Input(16, 24), limits) == 4
    draft = pixels.decode_judged(data, header, Input(16, 24), 4).astype(int)
    assert np.abs(draft - pixels.decode(data, Input(16, 24))).max() <= 3


def test_an_image_with_more_pixels_than_were_judged_is_refused():
    data = encoded(colour())
    with pytest.raises(InvalidImage, match="it promises 4 x 4 pixels and has more"):
        pixels.decode_judged(data, Header("PNG", 4, 4), Input(32, 32))


def test_the_squash_averages_areas():
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    out = pixels.decode(encoded(Image.fromarray(board.astype(np.uint8))), Input(32, 32))
    assert np.abs(out.astype(int) - 127.5).max() <= 1
    wide = pixels.decode(encoded(colour((320, 32))), Input(32, 32))
    expected = np.asarray(colour((320, 32)), dtype=float).reshape(32, 32, 10, 3).mean(axis=2)
    assert np.abs(wide - expected).max() <= 1


def test_a_picture_of_the_models_size_passes_unchanged():
    array = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels.decode(pixels.encode_png(array), Input(32, 32)), array)


def bomb(columns, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes"),
        (b"hello", "not an image"),
        (b"GIF89a" + bytes(100), "the GIF has 0 x 0|damaged"),
        (b"%PDF-1.7", "it is a PDF; send PNG, JPEG, WEBP, GIF"),
        (encoded(colour())[:200], "truncated or damaged"),
        (encoded(colour(), "JPEG")[:300], "truncated or damaged"),
        (bomb(20_000, 20_000), "limit is 50000000"),
        (bomb(8_000, 8_000), "limit is 50000000"),
        (bytes(Limits.max_bytes + 1), "limit is"),
    ],
)
def test_refusals_name_the_limit_or_the_fix(data, said):
    with pytest.raises(InvalidImage, match=said):
        pixels.decode(data, Input(32, 32))


SEEDS = [encoded(colour(), "PNG"), encoded(colour(), "JPEG"), encoded(colour(), "WEBP"), encoded(colour().convert("P"))]


@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=8), st.integers(0, 10_000))
def test_hostile_bytes_raise_nothing_but_invalid_image(seed, edits, cut):
    data = bytearray(seed)
    for place, value in edits:
        data[place % len(data)] = value
    try:
        out = pixels.decode(bytes(data[: max(1, len(data) - cut % 500)]), Input(16, 16))
    except InvalidImage:
        return
    assert out.shape == (16, 16, 3)


def test_the_grid_keeps_every_image_and_scales_by_repetition():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
    sheet = pixels.grid(images, 3)
    assert sheet.shape == (2 * 12, 3 * 12, 3)
    np.testing.assert_array_equal(sheet[12:24:3, 12:24:3], images[4])
    assert (sheet[12:, 24:] == 255).all()


def test_a_generated_png_says_so_to_machines():
    data = pixels.encode_png(np.zeros((4, 4, 3), np.uint8), [("Description", "class 3")], generated=True)
    with Image.open(io.BytesIO(data)) as picture:
        assert pixels.AI_ORIGIN in picture.info["XML:com.adobe.xmp"]
        assert picture.info["Description"] == "class 3"


def test_units_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels.to_bytes(pixels.to_unit(image)), image)


@pytest.mark.parametrize("background", [0, 2])
def test_what_the_first_frame_of_a_gif_leaves_of_its_screen_is_white(background):
    """Browsers leave it transparent, whatever the header says of a background."""
    codes = [code for _ in range(16 * 16) for code in (4, 1)] + [5]  # a clear code before each pixel: no table, and codes of 3 bits
    bits = sum(code << 3 * i for i, code in enumerate(codes)).to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = b"".join(bytes([len(part)]) + part for part in (bits[i : i + 255] for i in range(0, len(bits), 255)))
    header = b"GIF89a" + struct.pack("<HHBBB", 32, 32, 0x81, background, 0) + bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    decoded = pixels.decode(header + b"\x2c" + struct.pack("<HHHHB", 4, 8, 16, 16, 0) + b"\2" + blocks + b"\0;", Input(32, 32))
    expected = np.full((32, 32, 3), 255)
    expected[8:24, 4:20] = (0, 255, 0)
    np.testing.assert_array_equal(decoded, expected)


def test_a_large_gif_whose_first_frame_is_a_part_of_its_screen_takes_no_more_memory_than_its_header_promises():
    """It was converted whole, with transparency, and refused for its memory."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 4, (2999, 4000), dtype=np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    data = bytearray(encoded(picture, "GIF", transparency=3))
    data[8:10] = struct.pack("<H", 3000)  # the screen has a row more
    header = judge(bytes(data), Input(32, 32), Limits())
    code = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from ebjdat_serve import pixels\n"
        "from ebjdat_serve.contract import Input\n"
        "from ebjdat_serve.decoding.judge import judge\n"
        "from ebjdat_serve.decoding.header import Limits\n"
        "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "data = sys.stdin.buffer.read()\n"
        "header = judge(data, Input(32, 32), Limits())\n"
        "pixels.register('GIF')\n"
        "before = peak()\n"
        "assert pixels.decode_judged(data, header, Input(32, 32)).shape == (32, 32, 3)\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=bytes(data), capture_output=True, check=True)
    assert 3 * header.pixels < int(done.stdout) < header.memory(Input(32, 32), Limits())
