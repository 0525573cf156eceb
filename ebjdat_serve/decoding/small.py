"""Which images are small: judged in the event loop, within a budget for the whole request."""

import asyncio
from collections.abc import Sequence

from ebjdat_serve.contract import Input
from ebjdat_serve.decoding.header import Bytes, Header, Limits, Steps, TooLong
from ebjdat_serve.decoding.judge import check_list, each, judge

SMALL_BYTES, SMALL_WORK = 2**19, 2**18
"""Encoded bytes of a request that is judged in the event loop, and work of an image that is then small."""
SMALL_STEPS, TURN_STEPS = 4000, 1000
"""Steps that all its images may take there, and those of one turn of the loop, about 2 ms."""


async def small_headers(images: Sequence[Bytes], contract: Input, limits: Limits) -> list[Header]:
    """Return the headers of the images of one request if all are small; none where one is not, or where it takes too long to tell.

    The event loop has its turns meanwhile. Raises InvalidImage, with the index of the first that is refused.
    """
    headers: list[Header] = []
    steps, spare = Steps(TURN_STEPS), SMALL_STEPS - TURN_STEPS
    try:
        for header in each(images, lambda data: judge(data, contract, limits, steps)):
            if not header.sure or header.work > SMALL_WORK:
                return []
            headers.append(header)
            if steps.left < TURN_STEPS // 2 and spare > 0:
                await asyncio.sleep(0)
                grant = min(TURN_STEPS - int(steps.left), spare)
                spare -= grant
                steps.left += grant
    except TooLong:
        return []
    check_list(headers, contract, limits)
    return headers
