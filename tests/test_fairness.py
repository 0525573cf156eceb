"""Sharing between clients: equal shares whatever the number of their requests, nobody starves, nothing idles, and cheap to decide."""

import time
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.fairness import FairQueue, may_hold, work_until_done

costs = st.integers(1, 9)


def drained(queue: FairQueue) -> list:
    return [queue.pop() for _ in range(len(queue))]


def test_a_client_with_many_items_keeps_nobody_waiting():
    queue = FairQueue()
    for i in range(130):
        queue.push("greedy", ("greedy", i))
    for i in range(2):
        queue.push("polite", ("polite", i))
    assert [client for client, _ in drained(queue)[:4]] == ["greedy", "polite", "greedy", "polite"]


@given(st.lists(st.lists(costs, min_size=20, max_size=60), min_size=2, max_size=6), st.randoms())
@pytest.mark.slow
def test_shares_are_equal_while_all_wait_whatever_they_have_waiting(clients, random):
    queue, served = FairQueue(), Counter()
    items = [(client, cost) for client, wanted in enumerate(clients) for cost in wanted]
    random.shuffle(items)
    waiting = Counter(client for client, _ in items)
    for client, cost in items:
        queue.push(str(client), (client, cost), cost)
    while all(waiting.values()):
        client, cost = queue.pop()
        served[client] += cost
        waiting[client] -= 1
        assert max(served.values()) - min(served[i] for i in range(len(clients))) <= 2 * 9


@given(st.lists(st.tuples(st.sampled_from("abcd"), costs, st.booleans(), st.integers(0, 5)), max_size=120))
def test_every_item_is_served_once_in_its_clients_order_or_was_taken_back(events):
    queue, model, numbers = FairQueue(), {}, []
    for count, (client, cost, pops, place) in enumerate(events):
        assert len(queue) == sum(map(len, model.values()))
        if pops and len(queue):
            ahead = queue.peek()
            found = queue.pop()
            assert found == ahead
            assert model[found[0]].popleft() == found
        elif pops and numbers:
            number, item = numbers[place % len(numbers)]
            waits = item in model[item[0]]
            assert queue.remove(number) == waits
            if waits:
                model[item[0]].remove(item)
        else:
            item = (client, count)
            numbers.append((queue.push(client, item, cost), item))
            model.setdefault(client, deque()).append(item)
    rest = drained(queue)
    assert len(rest) == sum(map(len, model.values()))
    assert queue.peek() is None
    for found in rest:
        assert model[found[0]].popleft() == found
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.tuples(st.sampled_from("abcde"), costs), min_size=1, max_size=60), st.integers(0, 30), costs)
def test_a_newcomer_waits_for_about_one_item_of_each_client(items, served, cost):
    queue = FairQueue()
    for client, each in items:
        queue.push(client, (client, each), each)
    for _ in range(min(served, len(items) - 1)):
        queue.pop()
    queue.push("new", ("new", cost), cost)
    before = Counter()
    while (found := queue.pop())[0] != "new":
        before[found[0]] += found[1]
    assert all(waited <= 2 * 9 for waited in before.values())


@given(st.integers(1, 40), st.integers(0, 8))
def test_an_endless_row_of_new_clients_starves_nobody(waiting, others):
    """Each sends one item and is never seen again; as many come as are served."""
    queue = FairQueue()
    for _ in range(waiting):
        queue.push("old", "old")
    for i in range(others):
        queue.push(f"first {i}", "new")
    taken = turns = 0
    while taken < waiting:
        queue.push(f"new {turns}", "new")
        taken += queue.pop() == "old"
        turns += 1
        assert turns <= 2 * taken * (others + taken + 2) + others + 2  # whenever the old one is served, one more new one waits


def test_who_idles_saves_nothing_up():
    queue = FairQueue()
    queue.push("idle", ("idle", 0))
    for i in range(1000):
        queue.push("busy", ("busy", i))
    for _ in range(500):
        queue.pop()
    for i in range(20):
        queue.push("idle", ("idle", i))
    assert abs(Counter(queue.pop()[0] for _ in range(20))["idle"] - 10) <= 1


def test_who_leaves_and_comes_back_at_once_gains_nothing():
    """A client with one item at a time, pushed when the last is served, has its share and no more."""
    queue, served = FairQueue(), Counter()
    for i in range(100):
        queue.push("many", ("many", i), 1)
    queue.push("one", ("one", 0), 3)
    for _ in range(100):
        client, _ = queue.pop()
        served[client] += 3 if client == "one" else 1
        if client == "one":
            queue.push("one", ("one", 0), 3)
    assert abs(served["one"] - served["many"]) <= 6


def test_what_is_charged_later_counts():
    """As in decoding, where an item's cost is known when it is done."""
    queue, served = FairQueue(), Counter()
    for i in range(100):
        for client in ("bombs", "small"):
            queue.push(client, (client, i))
    for _ in range(60):
        client, _ = queue.pop()
        cost = 10 if client == "bombs" else 1
        queue.charge(client, cost - 1)
        served[client] += cost
    assert abs(served["bombs"] - served["small"]) <= 20
    queue.charge("small", -100)
    assert Counter(queue.pop()[0] for _ in range(10))["small"] <= 10


def test_memory_and_time_do_not_grow_with_clients_that_have_left():
    queue = FairQueue()
    queue.push("stays", "stays", 1e9)
    queue.push("stays", "stays", 1e9)
    for i in range(20_000):
        number = queue.push(f"client {i}", i)
        if i % 3:
            queue.remove(number)
        else:
            queue.pop()
    assert len(queue._finished) + len(queue._order) + len(queue._clients) < 200
    assert best_of_ten(10_000) < 20 * best_of_ten(100)


def best_of_ten(clients: int) -> float:
    """Return the seconds that 100 items take through a queue of so many clients."""
    queue, times = FairQueue(), []
    for i in range(clients):
        queue.push(f"client {i}", i)
    for _ in range(10):
        began = time.perf_counter()
        for i in range(100):
            queue.pop()
            queue.push(f"client {i}", i)
        times.append(time.perf_counter() - began)
    return min(times)


@pytest.mark.parametrize("cost", [0, -1, float("nan"), float("inf")])
def test_a_cost_is_above_zero(cost):
    with pytest.raises(ValueError, match="above 0"):
        FairQueue().push("a", 1, cost)


# a bounded buffer ------------------------------------------------------------------------------------------------------------


def test_one_client_takes_half_of_a_buffer_and_leaves_room_for_the_rest():
    held = {}
    while may_hold(held, "greedy", 1, 128):
        held["greedy"] = held.get("greedy", 0) + 1
    assert held == {"greedy": 64}
    for i in range(10):
        assert may_hold(held, f"polite {i}", 1, 128)
        held[f"polite {i}"] = 1
    assert may_hold({}, "a", 64, 128)
    assert not may_hold({}, "a", 65, 128)
    assert not may_hold({"a": 64}, "b", 64, 128)
    assert may_hold({"a": 64}, "b", 32, 128)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 64)), max_size=200), st.integers(1, 300))
def test_a_buffer_is_never_more_than_full_and_a_place_is_left_for_a_newcomer_until_then(asked, size):
    held: dict[str, int] = {}
    for client, n in asked:
        if may_hold(held, str(client), n, size):
            held[str(client)] = held.get(str(client), 0) + n
    total = sum(held.values())
    assert total <= size
    assert may_hold(held, "newcomer", 1, size) == (total < size)


# when work is done -----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.sampled_from("abcde"), st.integers(1, 60)), st.integers(1, 60))
def test_the_estimate_is_what_serving_in_turn_takes(left, work):
    """Within a unit for each client: served one unit after the other."""
    queue = FairQueue()
    for client, units in {**left, "a": left.get("a", 0) + work}.items():
        for _ in range(units):
            queue.push(client, client)
    order = drained(queue)
    done = len(order) - order[::-1].index("a")
    assert abs(done - work_until_done(left, "a", work)) <= len(left) + 1
