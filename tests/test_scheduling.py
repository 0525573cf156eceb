"""Tests of the scheduler: the same images as unscheduled, short groups first, shares of clients, no starvation, no step after removal."""

import heapq
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.client_shares import CLIENT_QUOTA, CREDIT
from ebjdat_serve.engines import load_engine
from ebjdat_serve.scheduling import FAIRNESS_QUOTA, ChainGroup, Policy, Scheduler
from ebjdat_serve.sgld import Chains, Prior, Sampler

SAMPLER = Sampler(steps=80, step_size=0.25, grad_clip=2.0, noise_std=0.005)


class Counting:
    """An engine that only counts: it remembers every batch, and its clock goes a second a chain-step, or a second a step."""

    def __init__(self, provider="CPUExecutionProvider"):
        self.provider, self.batches, self.now = provider, [], 0.0

    def advance(self, chains, steps):
        self.batches.append((len(chains.label), steps))
        self.now += steps * (len(chains.label) if "CPU" in self.provider else 1e-3)
        return chains.moved(chains.image, steps)


def blank(engine, n, steps, client=""):
    zeros = np.zeros((n, 3, 2, 2), np.float32)
    return ChainGroup(engine, Chains.at(zeros, SAMPLER, np.zeros(n, np.int64), seed=0), steps, client)


def turns_until(scheduler, group, limit=100_000):
    for turn in range(limit):
        if group not in scheduler.groups:
            return turn
        scheduler.advance()
    raise AssertionError("it never ended")


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_pictures_are_those_of_a_chain_alone(shipped, kind):
    """Bit for bit with ONNX Runtime on a CPU, whatever the company; with torch within 1e-4 after 20 steps."""
    engine = load_engine(shipped, kind, "cpu")
    prior = Prior.load(shipped.path / "prior.safetensors")
    wanted = [(3, 2, 20, 0), (5, 1, 7, 100), (1, 5, 12, 200), (3, 1, 20, 0)]
    samplers = [SAMPLER, replace(SAMPLER, step_size=0.1), replace(SAMPLER, noise_std=0.0), SAMPLER]
    starts = [
        Chains.start(prior, sampler, np.full(n, label, np.int64), seed)
        for (label, n, _, seed), sampler in zip(wanted, samplers, strict=True)
    ]
    alone = [
        np.concatenate([engine.advance(start.rows(slice(i, i + 1)), steps).image for i in range(n)])
        for start, (_, n, steps, _) in zip(starts, wanted, strict=True)
    ]
    scheduler = Scheduler()
    groups = [ChainGroup(engine, start, steps) for start, (_, _, steps, _) in zip(starts, wanted, strict=True)]
    for group in groups:  # they join one after the other, while those before are under way
        scheduler.join(group)
        scheduler.advance()
    while scheduler.groups:
        scheduler.advance()
    for group, expected in zip(groups, alone, strict=True):
        if kind == "onnx":
            np.testing.assert_array_equal(group.chains.image, expected)
        else:
            np.testing.assert_allclose(group.chains.image, expected, atol=1e-4)
    np.testing.assert_allclose(groups[0].chains.image[0], groups[3].chains.image[0], atol=0 if kind == "onnx" else 1e-4)


def test_a_short_group_overtakes_long_ones_and_waits_for_little_more_than_its_own_time():
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    for _ in range(8):
        scheduler.join(blank(engine, 1, 600))
    for _ in range(10):
        scheduler.advance()
    short, began = blank(engine, 1, 20), engine.now
    scheduler.join(short)
    turns_until(scheduler, short)
    assert engine.now - began <= 20 * (1 + FAIRNESS_QUOTA) + Policy.of(engine).width


def test_what_nobody_took_is_not_owed_to_those_who_come_later():
    """After a chain that was alone for long, a turn that it leads adds one chain by the quota, not all it could have added before."""
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    short = blank(engine, 1, 60)
    scheduler.join(short)
    for _ in range(30):
        scheduler.advance()
    for _ in range(6):
        scheduler.join(blank(engine, 1, 600))
    scheduler.advance()
    assert engine.batches[-1] == (1 + round(FAIRNESS_QUOTA), 1)


def test_long_groups_go_on_under_a_stream_of_short_ones():
    """Their share of all chain-steps is FAIRNESS_QUOTA / (1 + FAIRNESS_QUOTA)."""
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    long = [blank(engine, 1, 600) for _ in range(8)]
    for group in long:
        scheduler.join(group)
    short = blank(engine, 1, 20)
    while engine.now < 3000:
        if short not in scheduler.groups:
            short = blank(engine, 1, 20)
            scheduler.join(short)
        scheduler.advance()
    taken = sum(int(group.chains.step.sum()) for group in long)
    assert taken == pytest.approx(FAIRNESS_QUOTA / (1 + FAIRNESS_QUOTA) * 3000, rel=0.05)
    assert max(group.left for group in long) - min(group.left for group in long) <= Policy.of(engine).width


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(0, 60)), min_size=1, max_size=12))
def test_no_chain_waits_longer_than_the_stated_bound(jobs):
    """With N chains at most N (1 + 1 / FAIRNESS_QUOTA) chain-steps pass between two of a chain's, and a turn or two that was under way."""
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    coming = sorted(jobs, key=lambda job: job[2])
    last: dict[tuple[int, int], float] = {}
    most = sum(n for n, _, _ in jobs)
    bound = most * (1 + 1 / FAIRNESS_QUOTA) + 3 * Policy.of(engine).width
    turn = 0
    while coming or scheduler.groups:
        while coming and (coming[0][2] <= turn or not scheduler.groups):
            n, steps, _ = coming.pop(0)
            group = blank(engine, n, steps)
            scheduler.join(group)
            last |= {(id(group), row): engine.now for row in range(n)}
        before = {id(group): group for group in scheduler.groups}
        for moved in scheduler.advance():
            for row in moved.rows:
                last[id(moved.group), int(row)] = engine.now
        for group in before.values():
            assert all(engine.now - last[id(group), int(row)] <= bound for row in group.unfinished())
        turn += 1


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 15)), min_size=1, max_size=8), st.booleans())
def test_every_chain_takes_exactly_its_steps(jobs, gpu):
    engine = Counting("CUDAExecutionProvider" if gpu else "CPUExecutionProvider")
    scheduler = Scheduler(lambda: engine.now)
    groups = [blank(engine, n, steps) for n, steps in jobs]
    for group in groups:
        scheduler.join(group)
    finished = dict.fromkeys(groups, 0)
    while scheduler.groups:
        for moved in scheduler.advance():
            finished[moved.group] += len(moved.finished)
    for group, (n, steps) in zip(groups, jobs, strict=True):
        assert (group.chains.step == steps).all()
        assert finished[group] == n
    assert sum(n * steps for n, steps in engine.batches) == sum(n * steps for n, steps in jobs)


def test_a_gpu_is_filled_and_takes_several_short_steps_a_turn():
    engine = Counting("CUDAExecutionProvider")
    scheduler = Scheduler(lambda: engine.now)
    for n, steps in ((100, 200), (50, 600), (1, 40)):
        scheduler.join(blank(engine, n, steps))
    scheduler.advance()
    scheduler.advance()
    assert [n for n, _ in engine.batches] == [151, 151]
    assert engine.batches[1][1] > 1


def test_a_group_that_leaves_takes_no_further_step():
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    stays, leaves = blank(engine, 1, 10), blank(engine, 3, 10)
    scheduler.join(stays)
    scheduler.join(leaves)
    scheduler.advance()
    taken = int(leaves.chains.step.sum())
    scheduler.leave(leaves)
    turns_until(scheduler, stays)
    assert int(leaves.chains.step.sum()) == taken
    assert not scheduler.groups


def test_two_engines_are_never_in_one_batch_and_both_get_on():
    old, new = Counting(), Counting()
    scheduler = Scheduler(lambda: old.now + new.now)
    first = blank(old, 2, 50)
    scheduler.join(first)
    for _ in range(20):
        scheduler.join(blank(new, 1, 3))
        scheduler.advance()
    assert first.chains.step.sum() > 0
    while scheduler.groups:
        scheduler.advance()
    assert sum(n * steps for n, steps in old.batches) == 100
    assert sum(n * steps for n, steps in new.batches) == 60


# clients ---------------------------------------------------------------------------------------------------------------


class Unshared:
    """The rule before clients were told apart: which rows are next."""

    def __init__(self):
        self.quota = 0.0

    def rows(self, groups, width, linear):
        order = sorted(groups, key=lambda group: (group.size_class, group.left))
        unfinished = {group: group.unfinished().tolist() for group in order}
        lead, room = {}, max(1, int(width / (1 + FAIRNESS_QUOTA)))
        for group in order:
            if not room or (linear and group.size_class > order[0].size_class):
                break
            lead[group] = unfinished[group][:room]
            room -= len(lead[group])
        leading = sum(map(len, lead.values()))
        quota, self.quota = divmod(self.quota + FAIRNESS_QUOTA * leading, 1.0)
        waiting = [
            (int(group.turn[row]), -group.left, i, row)
            for i, group in enumerate(order)
            for row in unfinished[group][len(lead.get(group, ())) :]
        ]
        for *_, i, row in heapq.nsmallest(min(int(quota), width - leading), waiting):
            lead.setdefault(order[i], []).append(row)
        return [(id(group), rows) for group, rows in lead.items()]


@pytest.mark.slow
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=12), st.booleans())
def test_one_client_has_every_turn_that_it_had_before_clients_were_told_apart(jobs, gpu):
    engine = Counting("CUDAExecutionProvider" if gpu else "CPUExecutionProvider")
    scheduler, before = Scheduler(lambda: engine.now), Unshared()
    policy, coming, turn = Policy.of(engine), sorted(jobs, key=lambda job: job[2]), 0
    while coming or scheduler.groups:
        while coming and (coming[0][2] <= turn or not scheduler.groups):
            n, steps, _ = coming.pop(0)
            scheduler.join(blank(engine, n, steps, "the only one"))
        expected = before.rows(scheduler.groups, policy.width, policy.linear)
        assert [(id(moved.group), moved.rows.tolist()) for moved in scheduler.advance()] == expected
        turn += 1


def test_clients_with_work_all_the_time_take_equally_many_steps_whatever_they_asked_for():
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    for _ in range(130):
        scheduler.join(blank(engine, 1, 600, "130 drawings"))
    scheduler.join(blank(engine, 64, 600, "64 images"))
    scheduler.join(blank(engine, 1, 6000, "one long"))
    taken = Counter()
    for _ in range(800):
        for moved in scheduler.advance():
            taken[moved.group.client] += moved.steps * len(moved.rows)
    assert max(taken.values()) - min(taken.values()) <= 2 * Policy.of(engine).width


def test_who_draws_now_and_then_leads_beside_one_that_has_130_drawings():
    """It takes 1 + CLIENT_QUOTA times as long as alone, and a turn that was under way."""
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    for _ in range(130):
        scheduler.join(blank(engine, 1, 600, "greedy"))
    for _ in range(10):
        for _ in range(100):
            scheduler.advance()
        polite, began = blank(engine, 1, 20, "polite"), engine.now
        scheduler.join(polite)
        turns_until(scheduler, polite)
        assert engine.now - began <= 20 * (1 + CLIENT_QUOTA) + Policy.of(engine).width


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 60), st.integers(1, 6), st.integers(0, 60)), max_size=10),
    st.integers(1, 6),
    st.booleans(),
)
@pytest.mark.slow
def test_no_chain_of_any_client_waits_longer_than_the_stated_bound(jobs, n, several_sizes):
    """A chain of a client with n, one of C clients, waits 2 C n (1 + 1 / FAIRNESS_QUOTA) (1 + 1 / CLIENT_QUOTA) chain-steps at most.

    The others come, go and come back at will, with the credit of who was away.
    """
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    for i in range(n):
        scheduler.join(blank(engine, 1, 8 if several_sizes and i else 40, "patient"))
    last = {(id(group), 0): 0.0 for group in scheduler.groups}
    patient = {id(group): group for group in scheduler.groups}
    coming, turn = sorted(jobs, key=lambda job: job[3]), 0
    bound = 2 * 5 * n * (1 + 1 / FAIRNESS_QUOTA) * (1 + 1 / CLIENT_QUOTA) + (CREDIT + 2) * Policy.of(engine).width
    while any(group.left for group in patient.values()):
        while coming and coming[0][3] <= turn:
            client, m, steps, _ = coming.pop(0)
            scheduler.join(blank(engine, m, steps, client))
        for moved in scheduler.advance():
            for row in moved.rows:
                last[id(moved.group), int(row)] = engine.now
        assert all(engine.now - last[key, 0] <= bound for key, group in patient.items() if group.left)
        turn += 1


def test_what_is_known_of_clients_goes_with_them():
    engine = Counting()
    scheduler = Scheduler(lambda: engine.now)
    scheduler.join(blank(engine, 1, 20_000, "stays"))
    for i in range(2000):
        scheduler.join(blank(engine, 1, 1, f"client {i}"))
        scheduler.advance()
    assert len(scheduler._quota) <= len({group.client for group in scheduler.groups}) + 1


def few_beside_many(engine, prior, sampler, steps=10):
    """Assert that ten chains of one client take every step of a GPU's turns, however many wait of another, and are drawn as alone."""

    def group(client, n, seed):
        return ChainGroup(engine, Chains.start(prior, sampler, np.arange(n) % len(prior.mean), seed), steps, client)

    scheduler, few, many = Scheduler(), group("few", 10, 1), [group("many", 300, seed) for seed in (2, 3)]
    alone = engine.advance(few.chains, steps).image
    for one in (*many, few):
        scheduler.join(one)
    taken = 0
    while few in scheduler.groups:
        moved = scheduler.advance()
        assert sum(len(one.rows) for one in moved) == Policy.of(engine).width == 256
        taken += max(one.steps for one in moved)
    assert taken == steps
    np.testing.assert_allclose(few.chains.image, alone, atol=1e-3)
    assert sum(one.left for one in many) == 2 * 300 * steps - (256 - 10) * steps


def test_clients_share_turns_of_a_gpus_width(golden, monkeypatch):
    """What test_gpu runs on a GPU, by the policy for one on the CPU."""
    monkeypatch.setattr(Policy, "of", lambda engine: Policy(256, False))
    bundle = Bundle.load(golden)
    few_beside_many(load_engine(bundle, "onnx", "cpu"), Prior.load(bundle.path / "prior.safetensors"), bundle.manifest.sampler)
