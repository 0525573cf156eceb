"""What is said of an exception that others raise."""

import asyncio
import errno
import re

import pytest

from ebjdat_serve.decoding.header import Limits
from ebjdat_serve.decoding.pool import Decoders
from ebjdat_serve.decoding.pool_settings import PoolSettings
from ebjdat_serve.errors import cause
from ebjdat_serve.server.problems import TITLES
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TimeoutError(), "TimeoutError()"),
        (OSError(), "OSError()"),
        (ValueError(""), "ValueError('')"),
        (OSError("no number"), "no number"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), "No such file or directory"),
        (ValueError("a word"), "a word"),
    ],
)
def test_an_exception_that_says_nothing_is_named(error, said):
    assert cause(error) == said


def test_every_status_of_a_problem_has_a_title_of_its_own():
    sources = (ROOT / "ebjdat_serve").rglob("*.py")
    used = {int(status) for file in sources for status in re.findall(r"Problem\(\s*(\d{3})", file.read_text(encoding="utf-8"))}
    assert {400, 408, 499, 504} <= used <= set(TITLES)
    assert len(set(TITLES.values())) == len(TITLES)


def test_the_log_says_why_no_decoder_starts(monkeypatch, caplog):
    async def late(self, *, large):
        raise TimeoutError

    async def scenario():
        decoders = Decoders(PoolSettings(Limits(), large=1, memory=2**29, timeout=1))
        tending = asyncio.create_task(decoders._tend(large=False))
        while not caplog.text:
            await asyncio.sleep(0.001)
        tending.cancel()

    monkeypatch.setattr(Decoders, "_use_one", late)
    asyncio.run(asyncio.wait_for(scenario(), 5))
    assert "cannot start a decoder: TimeoutError(); the next one starts in" in caplog.text
