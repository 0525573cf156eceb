"""Large JSON of an inference request: what is around its strings and arrays of numbers is parsed as one, they are read in slices.

To parse 22 MB of JSON at once would keep the event loop for half a second, from any thread: Python's parser does not give way.
"""

import asyncio
import json
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read.bodies import parse_json
from ebjdat_serve.server.read.uploads import SEARCHED, SMALL_DOCUMENT, Base64Decoder, string_slices
from ebjdat_serve.server.v2_protocol import INPUT, InferRequest

NUMBERS_SLICE = 2**14
"""Bytes of an array of numbers that are parsed before the event loop has its turn, in some tenths of a millisecond."""
LONG = 2**10
"""Bytes of a string or an array, above which it is taken out."""
MAX_STRINGS = 512
"""Strings of a large document beside its images: names of fields, mostly."""
STRINGS_OF_A_TURN = 64
SPACED = bytes.maketrans(b"[]", b"  ")
OF_NUMBERS = b"0123456789, \t\r\n"
TOO_MUCH = f"the JSON around the data may have {SMALL_DOCUMENT} bytes, in which no quotes are escaped; see docs/v2.md"


class Place(NamedTuple):
    """Where a long string, without its quotes, or a long array lies in a document."""

    start: int
    end: int


async def take_out(body: bytearray, end: int, max_images: int) -> tuple[Any, dict[str, Place]]:
    """Return the JSON in ``body`` up to ``end``, with a name in place of each long string and array, and the place of each.

    Raises Problem 400.
    """
    if end <= SMALL_DOCUMENT:
        return parse_json(bytes(body[:end])), {}
    outline, places, at = bytearray(), dict[str, Place](), 0
    secret = secrets.token_hex(8)  # no document can hold such a name

    def name(place: Place) -> bytes:
        places[f"{secret} {len(places)}"] = place
        return b'"%b"' % next(reversed(places)).encode()

    for n in range(max_images + MAX_STRINGS):
        if n % STRINGS_OF_A_TURN == 0:
            await asyncio.sleep(0)
        opens = await find(body, b'"', at, end)
        if opens - at > LONG and (found := await array_in(body, at, opens)):
            outline += body[at : min(found.start, at + SMALL_DOCUMENT + 1)] + name(found)
            at = found.end
        outline += body[at : min(opens, at + SMALL_DOCUMENT + 1)]
        if len(outline) > SMALL_DOCUMENT:
            break
        if opens == end:
            return parse_json(bytes(outline)), places
        closes = await find(body, b'"', opens + 1, end)
        if closes == end or body[closes - 1 : closes] == b"\\":
            break
        outline += name(Place(opens + 1, closes)) if closes - opens > LONG else body[opens : closes + 1]
        at = closes + 1
    raise Problem(400, TOO_MUCH)


async def array_in(body: bytearray, start: int, end: int) -> Place | None:
    """Return where between two strings a long array is, if there is one: it ends before the brace of its input."""
    opens = body.find(b"[", start, start + LONG)
    if opens < 0:
        return None
    last = await find_last(body, b"]", opens, await find(body, b"}", opens, end))
    return Place(opens, last + 1) if last - opens > LONG else None


async def find(body: bytearray, what: bytes, start: int, end: int) -> int:
    """Return where a byte is between two places, the second of them if it is not."""
    for at in range(start, end, SEARCHED):
        if (found := body.find(what, at, min(end, at + SEARCHED))) >= 0:
            return found
        await asyncio.sleep(0)
    return end


async def find_last(body: bytearray, what: bytes, start: int, end: int) -> int:
    """Return where a byte is last between two places, -1 if it is not."""
    for at in range(end, start, -SEARCHED):
        if (found := body.rfind(what, max(start, at - SEARCHED), at)) >= 0:
            return found
        await asyncio.sleep(0)
    return -1


async def numbers(body: bytearray, place: Place, n: int, hold: Callable[[int], None]) -> bytearray:
    """Return the ``n`` numbers of a long array, flat or nested, as bytes. Raises Problem 400."""
    values, at, opened = bytearray(), place.start, 0
    while at < place.end:
        stop = place.end if place.end - at <= NUMBERS_SLICE else body.rfind(b",", at, at + NUMBERS_SLICE)
        text = bytes(body[at : max(at, stop)])
        opened += text.count(b"[") - text.count(b"]")
        try:
            new = bytes(json.loads(b"[%b]" % text.translate(SPACED)))
        except (ValueError, TypeError):
            new = b""
        if not new or text.translate(None, OF_NUMBERS + b"[]") or len(values) + len(new) > n:
            raise not_numbers(n)
        hold(len(new))
        values += new
        at = stop + 1
        await asyncio.sleep(0)
    if len(values) != n or opened:
        raise not_numbers(n)
    return values


def few_numbers(data: Any, shape: tuple[int, ...]) -> bytearray:
    """Return the numbers of a parsed list, flat or nested as ``shape`` says, as bytes. Raises Problem 400."""
    n = int(np.prod(shape))
    try:
        array = np.array(data if isinstance(data, list) else None)
    except ValueError:
        raise not_numbers(n) from None
    if array.dtype.kind not in "iu" or array.shape not in ((n,), shape) or array.min() < 0 or array.max() > 255:
        raise not_numbers(n)
    return bytearray(array.astype(np.uint8).tobytes())


def not_numbers(n: int) -> Problem:
    """Return the Problem of data that are not what the shape says."""
    return Problem(400, f"data of {INPUT} must be {n} whole numbers from 0 to 255, flat or nested by the shape")


async def files(body: bytearray, asked: InferRequest, places: dict[str, Place], hold: Callable[[int], None]) -> list[bytearray]:
    """Return the encoded images of base64 strings. Raises Problem 400 or 422."""
    data = asked.data
    if isinstance(data, list) and len(asked.shape) == 2 and all(isinstance(one, list) and len(one) == 1 for one in data):
        data = [one[0] for one in data]
    if not isinstance(data, list) or len(data) != asked.n:
        raise Problem(400, f"data of {INPUT} must be a list of {asked.n} base64 strings")
    found = []
    for index, text in enumerate(data):
        decoder = Base64Decoder(text, index)
        for piece in string_slices(body, *places[text]) if text in places else [text]:
            decoder.feed(piece)
            hold(decoder.new)
            await asyncio.sleep(0)
        decoder.finish()
        found.append(decoder.decoded)
    return found
