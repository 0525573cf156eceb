"""Tests of what a training step asks of its device: calls and reads of the host are counted, on the CPU; no time is measured."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.train_calls import PARTS, counted
from benchmarks.train_step import random_data
from tests.conftest import ROOT
from training.distributed import Noise
from training.loop.loop import clipped
from training.loop.start import new_optimiser, new_state
from training.methods.adversary import Ask, Attack, Threat, attacking, cross_entropy, frozen, together
from training.presets import CIFAR10, DIGITS

KEPT = json.loads((ROOT / "benchmarks" / "train_calls.json").read_text(encoding="utf-8"))


def kept(at, stage):
    (row,) = (row for row in KEPT if (row["at"], row["preset"]) == (at, stage.name))
    return row


@pytest.mark.parametrize(("stage", "most"), [(CIFAR10, 0.6), (CIFAR10.warm_start, 0.65)])
def test_a_step_asks_no_more_of_its_device_than_is_kept(stage, most):
    before, now = kept("985fe67", stage), kept("now", stage)
    calls, reads = counted(stage)
    parts = {part: sum(calls[part].values()) for part in PARTS}
    if torch.__version__ == now["torch"]:  # another torch counts otherwise, by a few
        assert parts == now["parts"], "python benchmarks/train_calls.py --json benchmarks/train_calls.json"
    assert sum(parts.values()) <= most * before["calls"]
    assert reads == now["reads"] == {"tolist": 1}  # loss, log and norm in one
    # a call for all parameters, not for each
    last = calls[PARTS[-1]]
    assert last["_foreach_lerp_"] == 1
    assert not {"lerp_", "add_", "linalg_vector_norm"} & {name for name, times in last.items() if times > 3}
    # norms are folded once, for adversary and chains alike
    assert calls["inner problem"]["sqrt"] == 13


def walking(x, steps):
    """Steps along the first logit's gradient, as chains take them."""
    for _ in range(steps):
        x = x + 0.1 * (yield Ask(x, lambda logits: torch.eye(logits.shape[1])[0].expand_as(logits)))
    return x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("attack_steps", "walk_steps"), [(3, 3), (1, 3), (3, 0)])
def test_inner_loops_that_share_their_passes_end_where_each_ends_alone(model, dtype, attack_steps, walk_steps):
    model.autocast = dtype
    image, other, label = torch.rand(5, 3, 8, 8), torch.rand(3, 3, 8, 8), torch.arange(5) % 4
    passes = []

    def searches():
        how = {"objective": cross_entropy, "threat": Threat("linf", 0.1), "attack": Attack(attack_steps)}
        return attacking(image, label, noise=Noise.seeded(1), **how), walking(other, walk_steps)

    with frozen(model) as network:

        def counting(x):
            passes.append(len(x))
            return network(x)

        alone = [together(network, search)[0] for search in searches()]
        found = together(counting, *searches())
    for one, end in zip(alone, found, strict=True):
        torch.testing.assert_close(end, one, rtol=0, atol=1e-6)
        assert not end.requires_grad
    both = min(attack_steps, walk_steps)
    left = 5 if attack_steps > walk_steps else 3
    assert passes == [8] * both + [left] * (max(attack_steps, walk_steps) - both)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_all_parameters_at_once_are_each_by_itself_bit_by_bit(optimiser):
    """The optimiser, the limit of the gradient's norm, and the average: the same products and sums."""
    preset = replace(DIGITS, optimiser=optimiser, warm_start=None)
    state, data = new_state(preset, random_data(80, 8), None, torch.device("cpu")), torch.Generator().manual_seed(0)
    copy = preset.architecture.build(10)
    copy.load_state_dict(state.model.state_dict())
    single = new_optimiser(preset, copy)
    for group in single.param_groups:
        group["foreach"] = False
    mean = {name: value.clone() for name, value in copy.state_dict().items()}
    for step in range(3):
        for one, other in zip(state.model.parameters(), copy.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=data).contiguous(memory_format=torch.preserve_format)
            other.grad = one.grad.clone()
        length = clipped(list(state.model.parameters()), 5.0)
        assert torch.equal(length, torch.nn.utils.clip_grad_norm_(copy.parameters(), 5.0, foreach=False))
        state.optimiser.step()
        single.step()
        state.step = step + 1
        state.update_ema(0.995)
        for name, value in copy.state_dict().items():
            if value.is_floating_point():
                mean[name].lerp_(value, 1 - min(0.995, (2 + step) / (11 + step)))
    for name, value in copy.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value)
        assert torch.equal(state.ema[name], mean[name])


def test_a_restored_state_averages_what_it_restored(tmp_path):
    state = new_state(replace(DIGITS, warm_start=None), random_data(80, 8), None, torch.device("cpu"))
    state.save(tmp_path / "state.pt")
    for value in state.model.state_dict().values():
        value.add_(1)
    state.restore(tmp_path / "state.pt")
    state.step = 10**6
    with torch.no_grad():
        for value in state.model.parameters():
            value.add_(1)
    state.update_ema(0.5)
    for name, value in state.model.named_parameters():
        torch.testing.assert_close(state.ema[name], value.detach() - 0.5)
