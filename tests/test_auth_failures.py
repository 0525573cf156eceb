"""Wrong keys are slowed per client and logged without the key, with bounded memory and a bounded log."""

import logging
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.server.read import auth_failures
from ebjdat_serve.server.read.auth_failures import CLIENTS, FORGIVEN, FREE, HELD, HELD_PER_CLIENT, LINES, LONGEST_DELAY, AuthFailures


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def failures(clock) -> AuthFailures:
    return AuthFailures(clock)


def test_a_typing_error_costs_nothing_and_guessing_ever_more(failures):
    delays = [failures.failed("203.0.113.7") for _ in range(FREE + 8)]
    assert delays[:FREE] == [0.0] * FREE
    assert delays[FREE : FREE + 3] == pytest.approx([0.1, 0.2, 0.4])
    assert delays[-1] == LONGEST_DELAY
    assert failures.failed("203.0.113.8") == 0.0


def test_failures_are_forgiven_with_time(failures, clock):
    for _ in range(FREE + 3):
        failures.failed("203.0.113.7")
    clock.now += 4 * FORGIVEN
    assert failures.failed("203.0.113.7") == 0.0


def test_memory_is_bounded_by_the_number_of_clients_that_are_remembered(failures):
    for i in range(CLIENTS + 500):
        failures.failed(f"2001:db8:{i:x}::/64")
    assert len(failures) == CLIENTS


def test_held_answers_are_bounded_for_each_client_and_for_all(failures):
    for i in range(HELD):
        failures.failed(f"10.0.0.{i}")
    with ExitStack() as stack:
        mine = [stack.enter_context(failures.holding("10.0.0.0")) for _ in range(HELD_PER_CLIENT + 2)]
        assert mine == [True] * HELD_PER_CLIENT + [False] * 2
        others = [stack.enter_context(failures.holding(f"10.0.0.{i}")) for i in range(1, HELD)]
        assert others.count(True) == HELD - HELD_PER_CLIENT
    with failures.holding("10.0.0.0") as may:
        assert may


def test_the_log_names_the_client_counts_and_has_a_bounded_number_of_lines(failures, clock, caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(1000):
        failures.failed("203.0.113.7")
    assert caplog.messages == ["1 wrong API key from 203.0.113.7"]
    clock.now += 61
    failures.failed("203.0.113.7")
    assert caplog.messages[1:] == ["1000 wrong API keys from 203.0.113.7"]
    caplog.clear()
    clock.now += 600
    for i in range(1000):
        failures.failed(f"2001:db8:{i:x}::/64")
    assert len(caplog.messages) == LINES
    clock.now += 6
    failures.failed("203.0.113.9")
    assert caplog.messages[-1] == "1 wrong API key from 203.0.113.9; 990 more from clients that are not named"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 30)), max_size=60))
def test_a_delay_is_never_longer_than_stated_and_never_negative(events):
    clock = Clock()
    failures = AuthFailures(clock)
    for client, seconds in events:
        clock.now += seconds
        assert 0 <= failures.failed(client) <= auth_failures.LONGEST_DELAY
