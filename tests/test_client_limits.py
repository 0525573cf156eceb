"""Limits per client: exact, with a refusal that says which and until when, in memory that does not grow with clients that have left."""

import math
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.read import client_limits
from ebjdat_serve.server.read.client_limits import BEYOND_LOOPBACK, OPTIONS, ClientCounts, ClientLimits, limits_of
from ebjdat_serve.server.settings import SETTINGS, Settings


class Clock:
    now = 1e6

    def __call__(self):
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def counts(clock) -> ClientCounts:
    return ClientCounts(clock)


def admitted(counts, client, limits) -> bool:
    try:
        counts.request(client, limits)
    except Problem as problem:
        assert problem.status == 429
        return False
    return True


# the rate --------------------------------------------------------------------------------------------------------------------


def test_a_burst_then_the_rate_and_a_refusal_says_when_to_try_again(counts, clock):
    limits = ClientLimits(rate=0.5, burst=3)
    assert [admitted(counts, "a", limits) for _ in range(5)] == [True] * 3 + [False] * 2
    with pytest.raises(Problem, match=r"a sends more than 0\.5 requests per second") as refused:
        counts.request("a", limits)
    assert OPTIONS["rate"] in refused.value.detail
    clock.now += float(refused.value.headers["Retry-After"])
    assert [admitted(counts, "a", limits) for _ in range(2)] == [True, False]
    clock.now += 1e4
    assert [admitted(counts, "a", limits) for _ in range(4)] == [True] * 3 + [False]


@given(
    st.floats(0.1, 1000),
    st.integers(1, 50),
    st.lists(st.floats(0, 5) | st.just(0.0), min_size=1, max_size=80),
)
def test_in_no_interval_more_than_a_burst_and_the_rate_pass_and_what_is_within_passes(rate, burst, waits):
    clock = Clock()
    counts, limits, passed = ClientCounts(clock), ClientLimits(rate=rate, burst=burst), []
    tokens, last = float(burst), clock.now  # a bucket, written the other way
    for wait in waits:
        clock.now += wait
        tokens, last = min(burst, tokens + (clock.now - last) * rate), clock.now
        ok = admitted(counts, "a", limits)
        if abs(tokens - 1) > 1e-3:
            assert ok == (tokens >= 1)
        if ok:
            tokens = max(0.0, tokens - 1)
            passed.append(clock.now)
    for i, begin in enumerate(passed):
        for j in range(i, len(passed)):
            assert j - i + 1 <= burst + rate * (passed[j] - begin) + 1e-3


def test_clients_do_not_share_a_bucket(counts):
    limits = ClientLimits(rate=1, burst=1)
    assert [admitted(counts, client, limits) for client in ("a", "b", "a", "b")] == [True, True, False, False]


def test_a_limit_that_changes_with_its_key_file_holds_at_once(counts, clock):
    for _ in range(10):
        counts.request("a", ClientLimits(rate=10, burst=10))
    assert not admitted(counts, "a", ClientLimits(rate=10, burst=10))
    assert admitted(counts, "a", ClientLimits(rate=10, burst=100))
    assert not admitted(counts, "a", ClientLimits(rate=10, burst=1))
    assert admitted(counts, "a", ClientLimits())


# what is under way -----------------------------------------------------------------------------------------------------------


def room(counts, client, what, limits) -> int:
    """Return how many more of ``what`` the client may have at once, 9 at most."""

    def may(n):
        try:
            with counts.held(client, what, limits, n):
                return True
        except Problem:
            return False

    return sum(map(may, range(1, 10)))


@pytest.mark.parametrize("what", ["requests", "bodies", "chains"])
def test_what_is_under_way_is_bounded_and_given_back_whatever_happens(counts, what):
    limits = ClientLimits(**{what: 3})
    with ExitStack() as stack:
        stack.enter_context(counts.held("a", what, limits, 2))
        stack.enter_context(counts.held("a", what, limits))
        with pytest.raises(Problem, match=rf"a has 3 {what} under way, and may have 3") as refused, counts.held("a", what, limits):
            pass
        assert (refused.value.status, refused.value.headers["Retry-After"]) == (429, "1")
        assert OPTIONS[what] in refused.value.detail
        with counts.held("b", what, limits, 3):
            assert room(counts, "b", what, limits) == 0
    assert room(counts, "a", what, limits) == 3
    with pytest.raises(ZeroDivisionError), counts.held("a", what, limits, 3):
        _ = 1 / 0
    assert room(counts, "a", what, limits) == 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans()), max_size=60))
def test_the_count_is_what_is_held(events):
    counts, limits, open_ = ClientCounts(Clock()), ClientLimits(chains=6), {name: [] for name in "abc"}
    for client, n, ends in events:
        if ends and open_[client]:
            open_[client].pop(0)[1].close()
        else:
            stack, before = ExitStack(), sum(size for size, _ in open_[client])
            try:
                stack.enter_context(counts.held(client, "chains", limits, n))
            except Problem:
                assert before + n > 6
            else:
                assert before + n <= 6
                open_[client].append((n, stack))
        assert room(counts, client, "chains", limits) == 6 - sum(size for size, _ in open_[client])
    for stacks in open_.values():
        for _, stack in stacks:
            stack.close()


# keys and defaults -----------------------------------------------------------------------------------------------------------


def test_a_keys_own_limits_go_before_and_are_named(counts):
    limits = BEYOND_LOOPBACK.of_key(rate=2, burst=None, concurrency=1)
    assert (limits.rate, limits.tolerance, limits.requests, limits.chains) == (2, 1.5, 1, BEYOND_LOOPBACK.chains)
    for _ in range(4):
        counts.request("key:shop", limits)
    with pytest.raises(Problem, match="rate of its key"):
        counts.request("key:shop", limits)
    held = counts.held("key:shop", "requests", limits)
    with held, pytest.raises(Problem, match="concurrency of its key"), counts.held("key:shop", "requests", limits):
        pass
    assert BEYOND_LOOPBACK.of_key(rate=None, burst=None, concurrency=None) == BEYOND_LOOPBACK


def test_what_is_beyond_a_limit_by_itself_is_not_asked_to_come_again(counts):
    with pytest.raises(Problem) as refused, counts.held("a", "chains", ClientLimits(chains=10), 11):
        pass
    assert (refused.value.status, refused.value.headers) == (422, None)
    assert "may have 10 chains at a time, and asks for 11 at once" in refused.value.detail


def test_the_largest_drawing_is_within_the_limit_of_chains():
    assert limits_of(Settings(host="0.0.0.0", max_samples=128)).chains == 128
    assert limits_of(Settings(host="0.0.0.0", max_samples=8)).chains == BEYOND_LOOPBACK.chains


def test_limits_are_on_where_others_can_connect():
    for host in ("0.0.0.0", "::"):
        assert limits_of(Settings(host=host)) == BEYOND_LOOPBACK
    for host in ("127.0.0.1", "localhost"):
        assert limits_of(Settings(host=host)) == ClientLimits()
        assert limits_of(Settings(host=host, trusted_proxy=("10.0.0.0/8",))) == BEYOND_LOOPBACK


@pytest.mark.parametrize("name", OPTIONS)
def test_a_setting_wins_and_0_is_no_limit(name):
    assert getattr(limits_of(Settings(**{f"client_{name}": 7})), name) == 7
    assert getattr(limits_of(Settings(host="0.0.0.0", **{f"client_{name}": 0})), name) is None
    setting = next(one for one in SETTINGS if one.name == f"client_{name}")
    assert OPTIONS[name] == f"serve {setting.flag}"
    assert setting.default_text.startswith(f"{getattr(BEYOND_LOOPBACK, name):g} beyond loopback")


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_a_limit_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match="must be above 0"):
        ClientLimits(rate=value)


# memory ----------------------------------------------------------------------------------------------------------------------


def test_clients_that_left_are_forgotten(counts, clock):
    limits = ClientLimits(rate=10, burst=10, requests=5)
    with counts.held("stays", "requests", limits):
        for i in range(5000):
            client = f"2001:db8:{i:x}::/64"
            counts.request(client, limits)
            with counts.held(client, "requests", limits):
                clock.now += 0.01
        assert len(counts) < 50
        assert room(counts, "stays", "requests", limits) == 4


def test_a_flood_of_clients_is_bounded_and_forgets_none_that_has_something_under_way(counts, monkeypatch):
    monkeypatch.setattr(client_limits, "CLIENTS", 100)
    limits = ClientLimits(rate=1e-3, burst=1, requests=5)
    with counts.held("stays", "requests", limits):
        for i in range(1000):
            counts.request(f"10.0.{i // 256}.{i % 256}", limits)
            assert len(counts) <= 101
        assert room(counts, "stays", "requests", limits) == 4


def test_a_client_is_not_forgotten_while_that_would_give_it_a_new_burst(counts, clock):
    limits = ClientLimits(rate=1, burst=5)
    assert [admitted(counts, "a", limits) for _ in range(6)][-1] is False
    for i in range(50):
        counts.request(f"10.0.0.{i}", limits)
    assert not admitted(counts, "a", limits)
