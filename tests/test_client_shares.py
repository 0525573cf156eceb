"""Chain-steps are shared between clients: in each turn, over time, and by the scheduler, ten polite clients beside a greedy one."""

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.client_shares import CLIENT_QUOTA, CREDIT, REMEMBERED, ClientShares
from ebjdat_serve.fairness import may_hold
from ebjdat_serve.scheduling import ChainGroup, Scheduler
from ebjdat_serve.sgld import Chains, Sampler

WIDTH = 8
chains = st.dictionaries(st.sampled_from("abcdefghijkl"), st.integers(1, 130), min_size=1)


@given(st.lists(st.tuples(chains, st.booleans()), max_size=30))
def test_a_turn_is_never_empty_never_too_wide_and_full_where_that_costs_nothing(turns):
    shares = ClientShares()
    for wanted, linear in turns:
        taken = shares.split(wanted, WIDTH, linear)
        assert all(1 <= n <= wanted[client] for client, n in taken.items())
        assert 1 <= sum(taken.values()) <= WIDTH
        if not linear or len(wanted) == 1:
            assert sum(taken.values()) == min(WIDTH, sum(wanted.values()))
        for client, n in taken.items():
            shares.charge(client, n)


def served(shares, wanted, turns, linear=True) -> Counter:
    total: Counter = Counter()
    for _ in range(turns):
        for client, n in shares.split(wanted, WIDTH, linear).items():
            shares.charge(client, n)
            total[client] += n
    return total


@given(st.lists(st.integers(WIDTH, 200), min_size=2, max_size=14), st.booleans())
def test_clients_that_have_work_all_the_time_have_equal_shares_however_many_chains(counts, linear):
    wanted = {str(i): n for i, n in enumerate(counts)}
    total = served(ClientShares(), wanted, 40 * len(wanted), linear)
    assert max(total.values()) - min(total[client] for client in wanted) <= 2 * WIDTH


def test_a_greedy_client_and_ten_with_one_chain_each_have_an_eleventh_each():
    total = served(ClientShares(), {"greedy": 130, **{f"polite {i}": 1 for i in range(10)}}, 1100)
    assert max(total.values()) / min(total.values()) < 1.05


@pytest.mark.parametrize("linear", [True, False])
def test_a_client_that_comes_after_a_pause_goes_first_for_its_credit_and_no_longer(linear):
    shares, wanted = ClientShares(), {"greedy": 500}
    served(shares, wanted, 200, linear)
    first = served(shares, wanted | {"new": 500}, CREDIT - 1, linear)
    assert first["new"] >= first["greedy"] / CLIENT_QUOTA * 0.9
    total = served(shares, wanted | {"new": 500}, 400, linear)
    assert total["new"] - total["greedy"] <= (CREDIT + 2) * WIDTH


@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 20)), min_size=1, max_size=300), st.booleans())
def test_whoever_comes_and_goes_a_client_with_work_is_served(turns, linear):
    """At most 2 N (1 + 1 / CLIENT_QUOTA) chain-steps and two turns pass between two of a client's, N the clients.

    Where turns are filled, those who come after a pause may use up their credit first, each of N - 1 in turns of their own.
    """
    shares, waited = ClientShares(), 0
    bound = 2 * 7 * (1 + 1 / CLIENT_QUOTA) + 2 * WIDTH if linear else 6 * (CREDIT + 1) * WIDTH
    for others in turns:
        taken = shares.split({"old": 30, **others}, WIDTH, linear)
        for client, n in taken.items():
            shares.charge(client, n)
        waited = 0 if "old" in taken else waited + sum(taken.values())
        assert waited <= bound


@pytest.mark.parametrize("linear", [True, False])
def test_visitors_are_forgotten_though_nobody_has_work_all_the_time_and_have_their_credit_again(linear):
    """None of them uses up its credit, so the clock of the shares stands still."""
    shares = ClientShares()
    served(shares, {"first": 1}, 20, linear)
    for i in range(3 * REMEMBERED):
        served(shares, {f"visitor {i}": 1, f"visitor {i + 1}": 1}, 1, linear)
        assert len(shares._served) <= REMEMBERED + 2
    assert "first" not in shares._served
    taken = served(shares, {"first": 100, f"visitor {i + 1}": 100}, 1, linear)
    assert taken["first"] >= WIDTH / 2 >= taken[f"visitor {i + 1}"]


def test_clients_that_left_are_forgotten():
    shares = ClientShares()
    for i in range(5000):
        for client, n in shares.split({"stays": 10, f"client {i}": 1}, WIDTH, True).items():
            shares.charge(client, n)
    assert len(shares._served) < 10 * CREDIT * WIDTH


# one greedy client beside ten polite ones -------------------------------------------------------------------------------------

RATES = ((1, 197.2), (2, 209.6), (4, 216.1), (8, 222.8))
"""Chain-steps a second of batches of so many, as benchmarks/serving measured the engine alone (docs/serving.md)."""
SHORT = 20


CHAINS = 128
"""--generate-chains."""
SAMPLER = Sampler(steps=80, step_size=0.25, grad_clip=2.0, noise_std=0.005)


class Machine:
    """The scheduler on an engine that takes RATES' time on a clock of its own; what is beyond the admission's bound is refused."""

    provider = "CPUExecutionProvider"

    def __init__(self, shared: bool) -> None:
        self.shared, self.now, self.taken = shared, 0.0, 0
        self.scheduler, self.held = Scheduler(lambda: self.now), Counter()
        self.done: dict[ChainGroup, Callable[[], None]] = {}
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.number = itertools.count()

    def advance(self, chains: Chains, steps: int) -> Chains:
        n = len(chains.label)
        (low, slow), (high, fast) = next(pair for pair in itertools.pairwise(RATES) if pair[0][0] <= n <= pair[1][0])
        self.now += steps * n / (slow + (fast - slow) * (n - low) / (high - low))
        self.taken += steps * n
        return chains.moved(chains.image, steps)

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.number), act))

    def submit(self, client: str, n: int, steps: int, done: Callable[[], None]) -> bool:
        if not (may_hold(self.held, client, n, 2 * CHAINS) if self.shared else self.held.total() + n <= CHAINS):
            return False
        self.held[client] += n
        start = Chains.at(np.zeros((n, 3, 1, 1), np.float32), SAMPLER, np.zeros(n, np.int64), seed=0)
        group = ChainGroup(self, start, steps, client if self.shared else "")

        def end() -> None:
            self.held[client] -= n
            done()

        self.done[group] = end
        self.scheduler.join(group)
        return True

    def run(self, seconds: float) -> None:
        while self.now < seconds:
            while self.events and self.events[0][0] <= self.now:
                heapq.heappop(self.events)[2]()
            if not self.scheduler.groups:
                self.now = self.events[0][0]
                continue
            for group in {moved.group for moved in self.scheduler.advance()} - set(self.scheduler.groups):
                self.done.pop(group)()


def simulate(shared: bool, greedy: tuple[int, int, int] | None, pause: float, seconds: float) -> tuple[list[float], int, float]:
    """Return the polite clients' seconds, sorted, how often one was refused, and chain-steps per second of all."""
    machine, chance, took, refused = Machine(shared), random.Random(0), list[float](), 0

    def loop(client: str, n: int, steps: int, rest: Callable[[], float], measured: bool) -> None:
        nonlocal refused
        began = machine.now

        def done() -> None:
            if measured:
                took.append(machine.now - began)
            machine.after(rest(), again)

        def again() -> None:
            loop(client, n, steps, rest, measured)

        if not machine.submit(client, n, steps, done):
            refused += measured
            machine.after(1.0, again)

    def think() -> float:
        return chance.expovariate(1 / pause) if pause else 0.004

    for i in range(10):
        machine.after((1 + 2 * pause) * chance.random(), lambda i=i: loop(f"polite {i}", 1, SHORT, think, True))
    if greedy:
        count, n, steps = greedy
        for _ in range(count):
            machine.after(0.0, lambda: loop("greedy", n, steps, lambda: 0.005, False))
    machine.run(seconds)
    return sorted(took), refused, machine.taken / machine.now


@pytest.mark.parametrize(
    ("greedy", "pause", "seconds"),
    [
        pytest.param((130, 1, 20), 0.0, 30, id="130 drawings"),
        pytest.param((3, 64, 80), 0.0, 30, id="jobs of 64 images", marks=pytest.mark.slow),
        pytest.param((130, 1, 80), 0.5, 60, id="130 drawings, pauses", marks=pytest.mark.slow),
        pytest.param((3, 64, 80), 2.0, 150, id="jobs of 64 images, long pauses", marks=pytest.mark.slow),
    ],
)
def test_beside_one_greedy_client_ten_polite_ones_are_all_admitted_and_wait_little_longer(greedy, pause, seconds):
    """The bar of issue 15: p99 of at most 1.5 times that without it, chain-steps of at least .9 of those unshared."""
    alone, _, _ = simulate(True, None, pause, seconds)
    beside, refused, rate = simulate(True, greedy, pause, seconds)
    _, turned_away, unshared = simulate(False, greedy, pause, 30)
    assert refused == 0
    assert turned_away > 0  # what the bar is for: today the polite ones are refused
    assert beside[int(0.99 * len(beside))] <= 1.5 * alone[int(0.99 * len(alone))]
    assert rate >= 0.9 * unshared
