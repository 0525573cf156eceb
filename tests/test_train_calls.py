"""Tests of what a training step asks of its device: calls and reads of the host are counted, on the CPU; no time is measured."""

import gc
import json
import weakref
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.train_calls import JOINT, LAUNCH, PARTS, WARM, captured, counted
from benchmarks.train_step import random_data
from ebjdat_serve.networks.wideresnet import WideResNet
from tests.conftest import ROOT
from training.data.datasets import load
from training.distributed import Noise
from training.loop.clock import Clock
from training.loop.loop import clipped, train
from training.loop.start import new_optimiser, new_state
from training.loop.validator import Validator
from training.methods import passes
from training.methods.adversary import Ask, Attack, Threat, attacking, cross_entropy, frozen, together
from training.presets import DIGITS

HOW = {"objective": cross_entropy, "threat": Threat("linf", 0.1), "attack": Attack(3)}
KEPT = json.loads((ROOT / "benchmarks" / "train_calls.json").read_text(encoding="utf-8"))


def kept(at, stage, road):
    (row,) = (row for row in KEPT if (row["at"], row["preset"], row["captured"]) == (at, stage.name, road))
    return row


@pytest.mark.parametrize(
    ("stage", "warm", "most"), [(JOINT, 0, 0.56), (JOINT.warm_start, 0, 0.63), (JOINT, WARM, 0.34), (JOINT.warm_start, WARM, 0.51)]
)
def test_a_step_asks_no_more_of_its_device_than_is_kept(stage, warm, most):
    before, now = kept("985fe67", stage, False), kept("now", stage, bool(warm))
    with captured() if warm else nullcontext():
        calls, reads = counted(stage, warm or 1)
    parts = {part: sum(calls[part].values()) for part in PARTS}
    if torch.__version__ == now["torch"]:  # another torch counts otherwise, by a few
        assert parts == now["parts"], "python benchmarks/train_calls.py --json benchmarks/train_calls.json"
    assert sum(parts.values()) <= most * before["calls"]
    assert reads == now["reads"] == {"tolist": 1}  # loss, log and norm in one
    # a call for all parameters, not for each
    last = calls[PARTS[-1]]
    assert last["_foreach_lerp_"] == 1
    assert not {"lerp_", "add_", "linalg_vector_norm"} & {name for name, times in last.items() if times > 3}
    inner = calls["inner problem"]
    assert inner["sqrt"] == 13  # norms are folded once, for adversary and chains alike
    assert inner[LAUNCH] == bool(warm) * 2 * stage.method.attack.steps
    assert inner["conv2d"] == (0 if warm else 16 * stage.method.attack.steps)


def weights_after(epochs, folder):
    stage = replace(DIGITS, epochs=epochs, precision="bf16", warm_start=None)
    file = train(stage, load("digits"), folder, init=None, clock=Clock(), device=torch.device("cpu"))
    return load_file(file)


def test_captured_passes_train_the_same_weights(tmp_path, monkeypatch):
    """What was captured reads the weights where they were then: they are folded into the same memory at each step."""
    alone = weights_after(0.25, tmp_path / "alone")
    launches = []
    with captured():
        launch = passes.captured
        monkeypatch.setattr(passes, "captured", lambda function, pool: launches.append(function.__name__) or launch(function, pool))
        found = weights_after(0.25, tmp_path / "captured")
    assert launches.count("_forward") == launches.count("_backward") >= 1
    for name, value in alone.items():
        assert torch.equal(found[name], value), name


def memory_of(network):
    """Return where what a pass reads lies, folded weights and norms and the head, and its values."""
    features, head = network._logits.args
    parts = [features._stem, *(one for block in features._blocks for one in block if one is not None), *features._out, *head.parameters()]
    return [part.data_ptr() for part in parts], [part.detach().clone() for part in parts]


def test_a_step_a_checkpoint_and_a_fold_leave_the_memory_that_a_capture_reads_where_it_is(tmp_path):
    """A captured pass reads addresses, not names: a rehearsal, which calls functions again, would not see them change."""
    stage = replace(DIGITS, precision="bf16", warm_start=None)
    state = new_state(stage, random_data(80, 8), None, torch.device("cpu"))
    state.save(tmp_path / "state.pt")
    with frozen(state.model) as network:
        places, values = memory_of(network)
    for change in ("step", "restore", "load"):
        for weight in state.model.parameters():
            weight.grad = torch.randn_like(weight)
        if change == "step":
            state.optimiser.step()
        elif change == "restore":
            state.restore(tmp_path / "state.pt")
        else:
            state.model.load_state_dict({name: value + 1 if value.is_floating_point() else value for name, value in state.ema.items()})
        with frozen(state.model) as network:
            there, now = memory_of(network)
            expected = torch.cat([one.flatten().float() for one in memory_of(passes.Passes(state.model))[1]])
        assert there == places, change
        assert torch.equal(torch.cat([one.flatten().float() for one in now]), expected), change
        assert all(torch.equal(*pair) for pair in zip(now, values, strict=True)) == (change == "restore")


@pytest.mark.parametrize(
    ("road", "said"),
    [
        (lambda function, pool: function, None),  # which captured() returns where nothing records
        (lambda function, pool: lambda: None, "captured passes are off"),  # a replay that does nothing
        (lambda function, pool: (lambda: None) if function.__name__ == "_forward" else (lambda: function()), "captured passes are off"),
    ],
    ids=["does not record", "records nothing", "records the first image"],
)
def test_passes_that_cannot_be_captured_are_called(model, monkeypatch, caplog, road, said):
    monkeypatch.setattr(passes, "FEW", 1)
    monkeypatch.setattr(passes, "on_gpu", lambda image: True)
    monkeypatch.setattr(passes, "captured", road)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    model.autocast = torch.bfloat16
    x, label = torch.rand(4, 3, 8, 8), torch.arange(4)
    with frozen(model) as network:
        found = [together(network, attacking(x, label, noise=Noise.seeded(1), **HOW))[0] for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], x)
    assert [said in record.getMessage() for record in caplog.records] == ([True] if said else [])


def test_captured_passes_that_do_not_fit_are_called_and_their_memory_is_given_back(model, monkeypatch, caplog):
    given_back = []

    def forward(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(passes.Graphs, "_forward", forward)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(True))
    model.autocast = torch.bfloat16
    x, label = torch.rand(4, 3, 8, 8), torch.arange(4)
    with frozen(model) as network:
        expected = together(network, attacking(x, label, noise=Noise.seeded(1), **HOW))[0]
    with captured(), frozen(model) as network:
        found = [together(network, attacking(x, label, noise=Noise.seeded(1), **HOW))[0] for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    assert len(given_back) == 1
    assert ["does not fit into the GPU's memory" in record.getMessage() for record in caplog.records] == [True]


def test_a_validation_keeps_no_captured_passes(monkeypatch):
    """The activations of a pass of 100 images would lie beside those of training for the rest of its stage."""
    made, honest = [], passes.Graphs

    def graphs(*given):
        one = honest(*given)
        made.append(weakref.ref(one))
        return one

    stage, data = replace(DIGITS, precision="bf16", warm_start=None), load("digits")
    validator = Validator(stage, data, torch.device("cpu"), n=20)
    with captured():
        monkeypatch.setattr(passes, "Graphs", graphs)
        validator.validate(validator.model.state_dict())
    gc.collect()  # a launch that is played here holds its Graphs, a replay of a GPU does not
    assert made and not any(one() for one in made)


def captured_as_called(device, monkeypatch):
    """Inner loops of captured passes end where those of single calls end, also when weights change; test_gpu asks it of a GPU."""
    torch.manual_seed(0)
    net = WideResNet(10, 1, 4).to(device, memory_format=torch.channels_last)
    net.autocast = torch.bfloat16
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(n, 3, 8, 8, generator=draw).to(device) for n in (6, 2)]

    monkeypatch.setattr(passes, "FEW", 1)
    for _ in range(3):
        with frozen(net) as network, torch.no_grad():
            found, expected = (torch.cat(together(one, *(walking(image, 4) for image in images))) for one in (network, net.folded()))
        (graphs,) = network._graphs.values()
        assert graphs._whole
        assert (found - expected).norm() <= 0.05 * (expected - torch.cat(images)).norm()
        with torch.no_grad():
            for weight in net.parameters():
                weight.mul_(0.8)


def test_captured_passes_end_where_calls_end(monkeypatch):
    with captured():
        captured_as_called(torch.device("cpu"), monkeypatch)


def test_a_copy_of_a_network_has_passes_of_its_own(model):
    """LAS-AT looks ahead with a copy, whose weights differ."""
    model.autocast = torch.bfloat16
    x = torch.rand(4, 3, 8, 8)
    with frozen(model) as network, torch.no_grad():
        before = network(x)
    ahead = deepcopy(model)
    with torch.no_grad():
        ahead.head.bias.add_(1)
        ahead.blocks[0].conv1.weight.mul_(1.5)
    with frozen(ahead) as network, torch.no_grad():
        assert (network(x) - before).abs().min() > 0
        torch.testing.assert_close(network(x), ahead.folded()(x))
    with frozen(model) as network, torch.no_grad():
        assert torch.equal(network(x), before)


@pytest.mark.parametrize("road", [nullcontext, captured])
def test_a_network_that_nobody_holds_is_gone_at_once(model, road):
    """LAS-AT makes a copy every few steps: in a circle it would keep its memory of the GPU until Python looks for circles."""
    model.autocast = torch.bfloat16
    x, label = torch.rand(4, 3, 8, 8), torch.arange(4)
    gc.disable()
    try:
        with road(), frozen(model) as network:
            together(network, attacking(x, label, noise=Noise.seeded(1), **HOW))
        copy = deepcopy(model)
        with road(), frozen(copy) as network:
            together(network, attacking(x, label, noise=Noise.seeded(1), **HOW))
        gone = weakref.ref(copy), weakref.ref(network)
        del copy, network
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


def walking(x, steps):
    """Steps along the first logit's gradient, as chains take them."""
    for _ in range(steps):
        x = x + 0.1 * (yield Ask(x, lambda logits: torch.eye(logits.shape[1], device=logits.device)[0].expand_as(logits)))
    return x


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("attack_steps", "walk_steps"), [(3, 3), (1, 3), (3, 0)])
def test_inner_loops_that_share_their_passes_end_where_each_ends_alone(model, dtype, attack_steps, walk_steps):
    model.autocast = dtype
    image, other, label = torch.rand(5, 3, 8, 8), torch.rand(3, 3, 8, 8), torch.arange(5) % 4
    passes = []

    def searches():
        attack = attacking(image, label, noise=Noise.seeded(1), **{**HOW, "attack": Attack(attack_steps)})
        return attack, walking(other, walk_steps)

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
