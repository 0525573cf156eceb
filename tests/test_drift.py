"""The drift test: its e-values on clean and drifted p-values, its state, and what a server tells of it."""

import json
import math
import time
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.drift import simulated, watch
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.drift import EDGES, LEVEL, NAMES, ODDS, DriftTest, Jumper, Ranks, reserve, share_interval
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server import drift_states
from ebjdat_serve.server.drift_states import LARGEST, Drift, DriftFile
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.server.tallies import KEPT
from tests.classifiers import images
from tests.conftest import DIGITS, HTTP, serving, until
from tests.test_metrics import scraped, total


def urn(test: DriftTest) -> np.ndarray:
    """The exact probability of each bin of the next p-value, by the calibration's ranks and the live ones so far."""
    ranks = np.searchsorted(EDGES, np.arange(1, test.n + 2) / (test.n + 1) - 1e-12)
    counts = np.bincount(ranks, minlength=len(EDGES)) + test.counts
    return counts / counts.sum()


@cache
def calibration():
    return Bundle.draft(SHIPPED).calibration()


def drift() -> Drift:
    return Drift(calibration(), 0.05)


@pytest.mark.parametrize("n", [1, 20, 2500])
def test_the_e_value_is_a_martingale_under_the_urn(n):
    """What is expected after the next p-value is what is held: exactly, at every time and after any traffic."""
    noise = np.random.default_rng(n)
    test = DriftTest(n)
    for _ in range(12):
        bins = np.flatnonzero(urn(test))
        tried = []
        for k in bins:
            one = DriftTest(n)
            one.restore(test.counts.tolist(), test.stakes.tolist())
            one.add(k)
            tried.append(math.exp(one.log_e))
        assert np.dot(urn(test)[bins], tried) == pytest.approx(math.exp(test.log_e), rel=1e-9)
        for k in noise.choice(bins, 15):
            test.add(k)


def test_the_urn_is_the_law_of_live_ranks():
    """Of a calibration set and two live scores the ranks' joint law, by simulation of scores."""
    n, draws = 9, 20_000
    noise = np.random.default_rng(0)
    scores = noise.standard_normal((draws, n + 2))
    test = DriftTest(n)
    first, second = (test.bin_of_rank[1 + (scores[:, :n] > scores[:, n + i, None]).sum(1)] for i in (0, 1))
    k = test.bin_of_rank[1]
    expected = urn(test)[k]
    test.add(k)
    expected *= urn(test)[k]
    assert np.mean((first == k) & (second == k)) == pytest.approx(expected, abs=4 * math.sqrt(expected / draws))
    assert expected == pytest.approx(0.1 * 2 / 11)


def test_odds_are_of_densities():
    widths = np.diff([0.0, *EDGES])
    assert np.allclose(widths @ ODDS, 1, atol=1e-4)
    assert (ODDS > 0).all()
    assert len(set(NAMES)) == ODDS.shape[1]


def test_clean_requests_raise_no_alarm_where_the_jumper_does_and_a_shift_does():
    clean = watch(100, simulated(100, 100, 1200), 100).first
    assert (clean["drift test", 0.01] > 0).sum() <= 4  # of 1 that is expected; benchmarks/drift.json has the figures
    assert (clean["simple jumper", 0.01] > 0).sum() >= 10
    moved = watch(2500, simulated(2500, 20, 600, 1.0, 400), 20).first["drift test", LEVEL]
    assert moved.min() > 400 and np.median(moved) < 480


def test_several_streams_are_each_as_one():
    bins = np.random.default_rng(0).integers(0, len(EDGES), (40, 3))
    together, alone = DriftTest(300, 3), [DriftTest(300) for _ in range(3)]
    jumpers, one = Jumper(3), Jumper()
    for row in bins:
        together.add(row)
        jumpers.add(row / 20)
        one.add(row[1] / 20)
        for test, k in zip(alone, row, strict=True):
            test.add(k)
    assert together.log_e == pytest.approx([float(test.log_e) for test in alone])
    assert together.counts.tolist() == [test.counts.tolist() for test in alone]
    assert jumpers.log_e[1] == pytest.approx(one.log_e)


def test_e_never_falls_below_the_reserve_and_never_overflows():
    test = DriftTest(50)
    for _ in range(1000):
        test.add_p(1 / 51)
        assert math.log(reserve(test.t)) <= test.log_e < 600
    assert test.log_e > 20
    assert test.leading.endswith("unlike the data") or "higher" in test.leading


def test_equal_scores_are_put_in_order_once():
    ranks = Ranks([1.0, 1.0, 1.0, 2.0])
    assert {ranks.of(1.0) for _ in range(200)} == {2, 3, 4, 5}
    assert [ranks.of(score) for score in (0.5, 1.5, 2.5)] == [5, 2, 1]


def test_the_interval_holds_the_rate_at_all_times_together():
    low, high = share_interval(50, 1000)
    assert 0.02 < low < 0.05 < high < 0.09
    assert share_interval(0, 0) == (0, 1)
    assert share_interval(0, 10)[0] == 0 and share_interval(10, 10)[1] == 1
    hits = np.cumsum(np.random.default_rng(0).random((40, 500)) < 0.05, axis=1)
    missed = [any(not low <= 0.05 <= high for low, high in (share_interval(int(row[t]), t + 1) for t in range(0, 500, 50))) for row in hits]
    assert sum(missed) <= 5


def test_a_state_goes_on_as_if_nothing_had_been():
    noise = np.random.default_rng(0)
    whole, first = drift(), drift()
    p = [0.01 * k for k in noise.integers(1, 60, 90).tolist()]
    parts = [predictions(p[:50]), predictions(p[50:], 50)]
    raised = [whole.note(part) for part in parts]
    assert first.note(parts[0]) == raised[0]
    again = drift()
    again.restore(json.loads(json.dumps(first.state())))
    assert again.state() == first.state()
    assert again.note(parts[1]) == raised[1]
    for name, value in whole.state().items():
        if name not in ("since", "alarm"):
            assert again.state()[name] == pytest.approx(value), name
    assert sum(raised) == 1 and again.alarm and not again.note(predictions([0.001], 99))  # raised once


def predictions(p: list[float], first: int = 0):
    """Predictions with scores that have about these p-values, of pictures with margins of their own."""
    found = np.quantile(calibration().scores, 1 - np.asarray(p)).astype(np.float32)
    return SimpleNamespace(suspicion=found, p_value=np.asarray(p), margin=np.arange(first, first + len(p), dtype=np.float32))


def test_a_picture_sent_again_is_counted_once():
    seen = drift()
    for _ in range(3):
        seen.note(predictions([0.3, 0.4]))
    assert (seen.test.t, seen.repeated) == (2, 4)
    seen.note(predictions([0.3, 0.3], 7))
    assert seen.test.t == 4


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[1]",
        b'{"format": 2, "states": {}}',
        b'{"format": 1, "states": {"a": 3}}',
        b'{"format": 1, "states": {}, "states": {}}',
        b"[" * 100_000,
        b" " * (LARGEST + 2),
    ],
)
def test_a_damaged_file_is_put_aside_and_said_in_a_line(tmp_path, caplog, content):
    file = tmp_path / "drift.json"
    file.write_bytes(content)
    DriftFile(file)
    assert len(caplog.messages) == 1 and "begin anew" in caplog.messages[0]
    assert "\n" not in caplog.messages[0] and len(caplog.messages[0]) < 400
    assert (tmp_path / "drift.json.damaged").read_bytes() == content
    assert json.loads(file.read_text(encoding="utf-8")) == {"format": 1, "states": {}}


@pytest.mark.parametrize(
    "name, value",
    [
        ("counts", [1] * 19),
        ("counts", [-1] * 20),
        ("counts", [1.5] * 20),
        ("counts", [10**30] * 20),
        ("counts", "x"),
        ("stakes", [-1.0] * 13),
        ("stakes", [None] * 13),
        ("stakes", []),
        ("capital", [5, 5, 5]),
        ("jumper", "nan"),
        ("flagged", True),
        ("flagged", 10**9),
        ("since", "x" * 1000),
        ("since", "2026\nERROR: forged"),
        ("alarm", 3),
        ("alarm", "\x1b[2J"),
    ],
)
def test_a_damaged_state_begins_anew(tmp_path, caplog, name, value):
    file, good = tmp_path / "drift.json", drift()
    good.note(predictions([0.5, 0.1]))
    file.write_text(json.dumps({"format": 1, "states": {"m": {**good.state(), name: value}}}), encoding="utf-8")
    fresh = drift()
    before = fresh.state()
    DriftFile(file).take("m", fresh)
    assert fresh.state() == before
    assert len(caplog.messages) == 1


def test_states_that_no_model_has_taken_yet_are_kept_for_each_model(tmp_path, monkeypatch):
    """A server of many models that is restarted twice, with no request between, goes on as one that had some."""
    file, noted, fresh = tmp_path / "drift.json", drift(), drift()
    noted.note(predictions([0.5, 0.1]))
    state = noted.state()
    states = {f"{model} {version} of 0.05": state for version in range(KEPT + 3) for model in ("a", "b", "c")}

    def kept():
        return list(json.loads(file.read_text(encoding="utf-8"))["states"])

    file.write_text(json.dumps({"format": 1, "states": states}), encoding="utf-8")
    for _ in range(2):
        DriftFile(file)
    assert kept() == list(states)[9:]
    assert DriftFile(file).take("a 5 of 0.05", fresh).test.t == 2
    monkeypatch.setattr(drift_states, "MOST", 10)
    DriftFile(file)
    assert kept() == list(states)[-10:]


def test_a_file_that_cannot_be_written_ends_the_start(tmp_path):
    with pytest.raises(EbjdatError, match="cannot be written"):
        DriftFile(tmp_path / "none" / "drift.json")


@pytest.mark.slow  # three servers
def test_a_server_tells_of_drift_and_goes_on_after_a_restart(tmp_path):
    file, pngs = tmp_path / "drift.json", [encode_png(image) for image in images(30, (12, 10), 3)]
    mine = {"model": Bundle.load(DIGITS).manifest.name, "version": Bundle.load(DIGITS).manifest.version}
    with serving(DIGITS, tmp_path / "one.log", "--device", "cpu", "--drift-state", str(file)) as server:
        assert HTTP.get(f"{server.url}/info").json()["drift"]["images"] == 0
        for png in [*pngs, *pngs[:3]]:  # noise is unlike digits
            assert HTTP.post(f"{server.url}/classify", content=png).status_code == 200
        told, found = HTTP.get(f"{server.url}/info").json()["drift"], scraped(server.url)
        assert (told["images"], told["repeated"], sum(told["p_values"])) == (30, 3, 30)
        assert told["flagged"]["low"] <= told["flagged"]["rate"] <= told["flagged"]["high"]
        assert told["alarm"] and told["log_e"] > told["log_e_alarm"] == pytest.approx(math.log(1000))
        assert "are not like the 200 calibration images" in told["means"]
        assert total(found["ebjdat_drift_log_e"], test="urn", **mine) == pytest.approx(told["log_e"])
        assert total(found["ebjdat_drift_log_e"], test="jumper", **mine) == pytest.approx(told["jumper_log_e"])
        assert total(found["ebjdat_drift_alarm"], **mine) == 1
        assert total(found["ebjdat_flag_rate"], **mine) == told["flagged"]["rate"]
        until(lambda: "drift of the traffic" in server.log.read_text(encoding="utf-8"))
        assert server.log.read_text(encoding="utf-8").count("drift of the traffic") == 1
    (of,) = json.loads(file.read_text(encoding="utf-8"))["states"]
    assert of.split()[1] == Bundle.load(DIGITS).served
    with serving(DIGITS, tmp_path / "two.log", "--device", "cpu", "--drift-state", str(file)) as server:
        again = HTTP.get(f"{server.url}/info").json()["drift"]
        assert {**again, "repeated": 0} == {**told, "repeated": 0}
    with serving(DIGITS, tmp_path / "three.log", "--device", "cpu", "--drift-state", str(file), "--alpha", "0.1") as server:
        assert HTTP.get(f"{server.url}/info").json()["drift"]["images"] == 0  # another flag


def test_a_p_value_costs_microseconds():
    seen, many = drift(), predictions([0.3, 0.5] * 32)
    began = time.process_time()
    for i in range(20):
        many.margin += 1000.0 * i + 1
        seen.note(many)
    assert (time.process_time() - began) / 1280 < 400e-6  # some 25 to 50 here
