"""The drift test of each version of a model, and the file by which it outlives a restart."""

import asyncio
import contextlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ebjdat_serve import strict_json
from ebjdat_serve.atomic import replacing
from ebjdat_serve.drift import LEVEL, DriftTest, Jumper, Ranks
from ebjdat_serve.errors import EbjdatError, cause
from ebjdat_serve.logs import now
from ebjdat_serve.manifest import Calibration
from ebjdat_serve.server.payloads import Predictions
from ebjdat_serve.server.regular_files import open_regular
from ebjdat_serve.server.tallies import KEPT
from ebjdat_serve.server.threads import in_daemon_thread

log = logging.getLogger("ebjdat_serve")
FORMAT = 1
LARGEST = 2**22
"""Bytes of a file of states at most; that of a version takes a thousand, and each model may keep KEPT of them."""
MOST = 1000
"""States that no model has taken yet which are kept at most: of models that are served no more, too."""
WRITE_SECONDS, LAST_SECONDS = 5.0, 2.0
"""Seconds between writes, and for the last one."""
REMEMBERED = 4096
"""Pictures that are known again when they are sent once more: retries and probes are no draws from the traffic."""
State = dict[str, Any]


class Drift:
    """What p-values say of one version's traffic: images, how many are flagged, the evidence that they are not as calibrated."""

    def __init__(self, calibration: Calibration, alpha: float) -> None:
        self.alpha, self.dataset = alpha, calibration.dataset
        self.test, self.jumper, self._ranks = DriftTest(len(calibration.scores)), Jumper(), Ranks(calibration.scores)
        self.flagged, self.repeated, self.since = 0, 0, now()
        self.alarm = ""  # when it was raised
        self._known: dict[tuple[float, float], None] = {}

    @property
    def log_e(self) -> float:
        """The log e-value, nats."""
        return float(self.test.log_e)

    def note(self, predictions: Predictions) -> bool:
        """Take the images of an answer; return whether they raise the alarm."""
        p = predictions
        for score, margin, p_value in zip(p.suspicion.tolist(), p.margin.tolist(), p.p_value.tolist(), strict=True):
            if score != score or self._seen((round(score, 3), round(margin, 3))):  # rounded: a batch's size decides on the last digits
                continue
            self.test.add(self.test.bin_of_rank[self._ranks.of(score)])
            self.jumper.add(p_value)
            self.flagged += p_value < self.alpha
        if raised := not self.alarm and self.log_e >= -math.log(LEVEL):
            self.alarm = now()
        return raised

    def _seen(self, picture: tuple[float, float]) -> bool:
        """Return whether a picture is known, and remember it."""
        if known := picture in self._known:
            self.repeated += 1
            del self._known[picture]
        self._known[picture] = None
        if len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]
        return known

    @property
    def words(self) -> str:
        """What the evidence means."""
        n, t = self.test.n, self.test.t
        if not self.alarm:
            return f"nothing so far says that the {t:,} images are unlike the {n:,} calibration images ({self.dataset})"
        return (
            f"the {t:,} images since {self.since} are not like the {n:,} calibration images ({self.dataset}): p-values, the flag's false "
            f"alarms and the share of reviews are not what was calibrated (alarm {self.alarm}, log e-value {self.log_e:.1f}; most like: "
            f"{self.test.leading}). Look at what is sent; calibrate on such images if they are as they should be (docs/drift.md)"
        )

    def state(self) -> State:
        """Return what ``restore`` takes."""
        numbers = {"counts": self.test.counts.tolist(), "stakes": self.test.stakes.tolist()}
        numbers |= {"capital": self.jumper.capital.tolist(), "jumper": float(self.jumper.log_e)}
        return {**numbers, "flagged": self.flagged, "repeated": self.repeated, "since": self.since, "alarm": self.alarm}

    def restore(self, state: State) -> None:
        """Go on where ``state`` was taken; raise ValueError, KeyError or TypeError for what is none, and change nothing then."""
        capital, jumper = [float(share) for share in state["capital"]], float(state["jumper"])
        flagged, repeated, since, alarm = state["flagged"], state["repeated"], state["since"], state["alarm"]
        if len(capital) != 3 or min(capital) < 0 or not 0.99 < sum(capital) < 1.01 or not math.isfinite(jumper):
            raise ValueError("capital must be three shares of 1")
        if any(type(n) is not int or n < 0 for n in (flagged, repeated)) or flagged > sum(state["counts"]):
            raise ValueError("flagged and repeated must be counts")
        if any(type(text) is not str or len(text) > 40 or not (text.isascii() and text.isprintable()) for text in (since, alarm)):
            raise ValueError("since and alarm must be times")
        self.test.restore(state["counts"], state["stakes"])
        self.jumper.capital[:], self.jumper.log_e = capital, self.jumper.log_e + jumper
        self.flagged, self.repeated, self.since, self.alarm = flagged, repeated, since, alarm


class DriftFile:
    """The states of a server's models by what they are of, in a file that is replaced whole; without a path, in memory alone."""

    def __init__(self, path: Path | None) -> None:
        """Read the file; one that is damaged is put aside. Raises EbjdatError for one that cannot be written."""
        self._path, self._written = path, ""
        self._states: dict[str, State] = {}  # those that no model has taken yet
        self._writing, self._failing = asyncio.Lock(), False
        if path is None:
            return
        try:
            self._states = read(path)
            self._write(self._text({}))
        except OSError as error:
            raise EbjdatError(f"the state of drift tests, {path}, cannot be written: {cause(error)}") from error

    def take(self, of: str, drift: Drift) -> Drift:
        """Return ``drift``, which goes on where one of the same ``of`` was."""
        if (state := self._states.pop(of, None)) is not None:
            try:
                drift.restore(state)
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                log.warning("%s: the state of a drift test is damaged, which begins anew: %s", self._path, str(error)[:100])
        return drift

    async def follow(self, states: Callable[[], dict[str, State]]) -> None:
        """Write what ``states`` returns again and again, in a thread: a disk that stalls keeps nobody."""
        while self._path is not None:
            await asyncio.sleep(WRITE_SECONDS)
            await self.write(states())
        await asyncio.Event().wait()  # what runs beside a server does not end

    async def write(self, states: dict[str, State]) -> None:
        """Write the states, if there is a file and they are others than before."""
        if self._path is None:
            return
        async with self._writing:  # one after the other: the last is the newest
            if (text := self._text(states)) == self._written:
                return
            try:
                await in_daemon_thread(partial(self._write, text))
                self._failing = False
            except OSError as error:
                if not self._failing:
                    log.warning("the drift test's state is not written, and a restart would begin anew: %s", cause(error))
                self._failing = True

    async def close(self, states: dict[str, State]) -> None:
        """Write the states a last time."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.write(states), LAST_SECONDS)

    def _text(self, states: dict[str, State]) -> str:
        return json.dumps({"format": FORMAT, "states": newest(self._states) | states})

    def _write(self, text: str) -> None:
        assert self._path
        with replacing(self._path, shared=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._written = text


def newest(states: dict[str, State]) -> dict[str, State]:
    """Return the last KEPT states of each model, by whose name their keys begin, MOST in all."""
    kept, of_model = list[str](), Counter[str]()
    for of in reversed(states):
        of_model[of.partition(" ")[0]] += 1
        if of_model[of.partition(" ")[0]] <= KEPT and len(kept) < MOST:
            kept.append(of)
    return {of: states[of] for of in reversed(kept)}


def read(path: Path) -> dict[str, State]:
    """Return the states in a file, none where there is no file; one that holds none is put aside with a warning. Raises OSError."""
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            content = file.read(LARGEST + 1)
    except FileNotFoundError:
        return {}
    try:
        if len(content) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST} bytes")
        found = strict_json.loads(content, unique=True)
        if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(states := found.get("states"), dict):
            raise ValueError(f"it is not of format {FORMAT}")
        if not all(isinstance(state, dict) for state in states.values()):
            raise ValueError("a state must be an object")
    except (ValueError, RecursionError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.rename(aside)
        log.warning("%s holds no states of drift tests, which begin anew; it is now %s: %s", path, aside.name, str(error)[:100])
        return {}
    return states
