"""Tests of other people's networks: wrapped, their gradients in operators that ONNX has, one copy of weights, hostile sources."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn

from ebjdat_serve.bundle import network_name
from ebjdat_serve.energy import energy, score
from ebjdat_serve.errors import BundleError, EbjdatError, EngineError
from ebjdat_serve.exporting.functions import export_network
from ebjdat_serve.exporting.gradients import ONE_CELL
from ebjdat_serve.exporting.reference import rounding
from ebjdat_serve.exporting.tracing import Score, traced
from ebjdat_serve.importing import checkpoint, hugging_face, python_code, timm
from ebjdat_serve.importing.contract_file import Contract
from ebjdat_serve.importing.torch_source import found
from ebjdat_serve.manifest import YES, Input, Licence
from ebjdat_serve.networks import (
    CONSTANT,
    FAMILIES,
    FOREIGN,
    HuggingFaceArchitecture,
    Normalisation,
    Plain,
    PythonArchitecture,
    Wrapped,
    architecture_of,
    build,
    find_head,
    network_of,
)
from ebjdat_serve.noise import normal
from ebjdat_serve.sgld import Sampler, langevin_step

SIDE, CLASSES = 12, 4
NORMALISED = Normalisation(255.0, [104.0, 117.0, 123.0], [58.0, 57.0, 59.0], "bgr")


class PlainCNN(nn.Module):
    """Max pooling, grouped and dilated convolutions, group norm, batch norm, dropout."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.ReLU6(), nn.MaxPool2d(3, 2, 1)),
            *(nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4), nn.BatchNorm2d(8), nn.Hardswish(), nn.Dropout(0.5)),
        )
        self.last = nn.Linear(8 * 36, CLASSES)

    def forward(self, x):
        return {"logits": self.last(self.body(x).flatten(1))}


class Attentive(nn.Module):
    """Patches with a learnt place each, attention, layer norm, GELU; a constant table that is no tensor of its weights."""

    def __init__(self):
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 9, 16))
        self.norm, self.qkv = nn.LayerNorm(16), nn.Linear(16, 48)
        self.mlp, self.last = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)), nn.Linear(16, CLASSES)
        self.table = torch.arange(9 * 9 * 16, dtype=torch.float32).reshape(1, 1, 36, 36) % 7

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm(x)).reshape(-1, 9, 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 9, 16)
        x = (x + self.mlp(x)).roll(1, 1)
        return (self.last(F.adaptive_avg_pool1d(x.transpose(1, 2), 1).flatten(1)) + self.table[0, 0, 1, 1],)


class Pooled(nn.Module):
    """Every other pooling and resize; the logits are a mean, so that no layer gives them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x):
        x = F.interpolate(x, size=(16, 14), mode="bilinear", align_corners=False)
        x = F.adaptive_avg_pool2d(F.silu(self.first(x)), (5, 3))
        x = F.avg_pool2d(F.interpolate(x, size=(9, 7), mode="bicubic"), 3, 2, 1, count_include_pad=False, ceil_mode=True)
        return self.last(F.interpolate(x, scale_factor=2, mode="nearest")).mean((2, 3))


class FixedKernel(nn.Module):
    """A kernel that is no weight, and so stays in fp32 whatever the module is told."""

    def __init__(self):
        super().__init__()
        self.kernel, self.last = torch.full((3, 1, 3, 3), 1 / 9), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.last(F.conv2d(x, self.kernel, groups=3).mean((2, 3)))


NETWORKS = {"plain": PlainCNN, "attentive": Attentive, "pooled": Pooled}


def network(kind):
    torch.manual_seed(0)
    module = NETWORKS[kind]().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 1.5)
    image = torch.rand(2, 3, SIDE, SIDE)
    head, _ = find_head(module, Wrapped(module, CLASSES, NORMALISED).normalised(image))
    return Wrapped(module, CLASSES, NORMALISED, head).eval().requires_grad_(False)


def relative(given, expected):
    return float(np.abs(given - expected.numpy()).max() / np.abs(expected.numpy()).max())


@pytest.mark.parametrize(("kind", "head"), [("plain", "last"), ("attentive", ""), ("pooled", "")])
def test_the_penultimate_layer_is_found_where_a_linear_layer_gives_the_logits(kind, head):
    net, image = network(kind), torch.rand(3, 3, SIDE, SIDE)
    assert net.head_name == head
    assert bool(net.no_features) == (not head)
    assert torch.equal(net.head(net.features(image)), net(image))
    assert (net.features(image).shape == (3, 288)) == bool(head)


def test_pixels_are_normalised_inside_in_the_order_of_the_channels():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    image = torch.rand(2, 3, 5, 5)
    blue, green, red = (255 * image.mean((2, 3)))[:, [2, 1, 0]].T
    expected = torch.stack([(blue - 104) / 58, (green - 117) / 57, (red - 123) / 59], 1)
    torch.testing.assert_close(Wrapped(Mean(), 3, NORMALISED)(image), expected)
    with pytest.raises(EngineError, match="fp32 alone with torch, not in bfloat16"):
        Wrapped(Mean(), 3, NORMALISED).folded(torch.bfloat16)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_gradient_is_traced_into_forward_operators_for_any_batch(kind):
    net = network(kind)
    function = traced(Score(net, torch.float32), (torch.rand(2, 3, SIDE, SIDE), torch.tensor([0, -1])))
    left = {str(node.target) for node in function.function.graph.nodes if "backward" in str(node.target)}
    decomposed_later = (
        "layer_norm",
        "group_norm",
        "gelu",
        "softmax",
        "hardswish",
        "hardtanh",
        "threshold",
        "slice",
        "select",
        "max_pool2d",
    )
    assert all(any(name in target for name in decomposed_later) for target in left), left
    for batch in (1, 5):
        image, label = torch.rand(batch, 3, SIDE, SIDE), torch.arange(batch) - 1
        given, expected = function(image, label), score(net, image, label)
        for one, other in zip(given, expected, strict=True):
            assert relative(one.numpy(), other) < 1e-5


def test_the_gradient_of_instance_norm_is_that_of_its_statistics():
    module = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.Flatten(), nn.Linear(64, 3)).eval().requires_grad_(False)
    )
    net = Wrapped(module, 3, Normalisation(), "3").eval()
    function = traced(Score(net, torch.float32), (torch.rand(2, 3, 6, 6), torch.tensor([0, -1])))
    image, label = torch.rand(3, 3, 6, 6), torch.tensor([0, 1, -1])
    assert relative(function(image, label)[0].numpy(), score(net, image, label)[0]) < 1e-5


def test_pooling_to_one_cell_is_known_by_all_its_names():
    assert {F.adaptive_avg_pool1d, F.adaptive_avg_pool2d} <= set(ONE_CELL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORKS)
def test_any_network_becomes_graphs_that_agree_with_it_on_one_copy_of_the_weights(kind, tmp_path):
    net = network(kind)
    done = export_network(net, tmp_path, SIDE, SIDE, {"name": kind, "version": "1"}, lambda _: None)
    assert done.gradient == YES
    assert (done.features == YES) == (kind == "plain")
    assert done.files == ["weights.safetensors", "classify.onnx", "score.onnx", "step.onnx"]
    tensors = load_file(tmp_path / "weights.safetensors")
    own = {name for name in tensors if not name.startswith(CONSTANT)}
    assert own == set(net.state_dict())
    assert all(tensors[name].nbytes > 1024 for name in set(tensors) - own)
    sessions = {name: ort.InferenceSession(tmp_path / f"{name}.onnx") for name in ("classify", "score", "step")}
    for batch in (1, 3, 32):
        image, label = torch.rand(batch, 3, SIDE, SIDE), torch.arange(batch) % (CLASSES + 1) - 1
        gradient, energies = score(net, image, label)
        outputs = sessions["classify"].run(None, {"image": image.numpy()})
        expected = [net(image), energy(net(image)), *([net.features(image)] if kind == "plain" else [])]
        assert len(outputs) == len(expected)
        for one, other in zip(outputs, expected, strict=True):
            assert relative(one, other) < 1e-4
        for one, other in zip(
            sessions["score"].run(None, {"image": image.numpy(), "label": label.numpy()}), (gradient, energies), strict=True
        ):
            assert relative(one, other) < 1e-3
    key, step = torch.randint(0, 2**31 - 1, (batch, 4, 4)), torch.arange(batch)
    each = {name: np.full(batch, value, np.float32) for name, value in (("step_size", 0.2), ("grad_clip", 1.0), ("noise_std", 0.01))}
    chain = {"image": image.numpy(), "label": label.numpy(), "key": key.numpy(), "step": step.numpy(), **each}
    moved, before, after = sessions["step"].run(["next_image", "energy", "next_step"], chain)
    expected = langevin_step(image, gradient, normal(key, step, (3, SIDE, SIDE)), Sampler(1, 0.2, 1.0, 0.01))
    assert relative(moved, expected) < 1e-4
    assert relative(before, energies) < 1e-4
    assert (after == step.numpy() + 1).all()


# families -------------------------------------------------------------------------------------------------------------


def test_foreign_families_are_described_and_never_guessed():
    described = PythonArchitecture("mine.nets:make", normalisation=NORMALISED, head="last").described()
    assert architecture_of(json.loads(json.dumps(described))) == PythonArchitecture("mine.nets:make", normalisation=NORMALISED, head="last")
    assert network_name(described) == "python mine.nets:make"
    assert network_name(HuggingFaceArchitecture({"model_type": "vit", "depth": 3}).described()) == "huggingface vit"
    assert all(kind.of_weights(network("plain").state_dict()) is None for kind in FOREIGN)
    weights = Plain(10, 1).build(3).state_dict()
    assert network_of({**weights, f"{CONSTANT}0123": torch.ones(300)}).classes == 3  # what graphs alone take is left out


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"family": "timm", "model": "../x"}, "no name of a model of timm"),
        ({"family": "huggingface", "config": {}}, "must name model_type"),
        ({"family": "huggingface", "config": {"model_type": "timm_wrapper"}}, "is of 'timm_wrapper'"),
        ({"family": "huggingface", "config": {"model_type": "vit", "auto_map": {"AutoConfig": "x"}}}, "never run"),
        ({"family": "python", "callable": "os.system('x')"}, "not package.module:callable"),
        (
            {"family": "python", "callable": "a:b", "normalisation": {"scale": 0.0, "mean": [], "std": [], "channels": "rgb"}},
            "scale must be",
        ),
        ({"family": "onnx", "opset": "17"}, "is not a int"),
    ],
)
def test_a_manifest_that_describes_no_network_is_refused(described, said):
    filled = {"normalisation": vars(Normalisation()), "head": "", **described} if described["family"] != "onnx" else described
    with pytest.raises(BundleError, match=said):
        architecture_of(filled)


@pytest.mark.parametrize(
    ("family", "sizes", "said"),
    [
        ("timm", {"model": "resnet18"}, "needs the package timm: .*pip install"),
        ("huggingface", {"config": {"model_type": "vit"}}, "needs the package transformers"),
        ("python", {"callable": "os:getcwd"}, "never is to serve"),
    ],
)
def test_the_torch_engine_says_in_one_line_why_it_has_no_such_network(family, sizes, said, monkeypatch):
    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(EngineError, match=said) as refused:
        build(FAMILIES[family](**sizes), 3)
    assert "\n" not in str(refused.value)
    assert refused.value.options == ("--engine onnx",)


# sources --------------------------------------------------------------------------------------------------------------

TOLD = Contract(input={"height": SIDE, "width": SIDE, "resize": "shorter", "filter": "bicubic"}, scale=2.0, mean=[0.5] * 3, std=[1.0] * 3)
ASKED = {"labels": None, "contract": TOLD, "licence": Licence(weights="MIT"), "allow_code": False}


def test_python_code_is_run_with_leave_alone_and_says_what_it_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_nets_of_a_user.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(432, 5))\n\ndef soft():\n"
        "    return nn.Sequential(make(), nn.Softmax(1))\n\ndef broken():\n    raise ValueError('two\\nlines')\n\n"
        "def none():\n    return 3\n"
    )
    with pytest.raises(EbjdatError, match="code, which would run with your rights") as refused:
        python_code.find("python:own_nets_of_a_user:make", **ASKED)
    assert refused.value.options == ("--allow-code",)
    assert "own_nets_of_a_user" not in sys.modules
    asked = {**ASKED, "allow_code": True}
    done = python_code.find("python:own_nets_of_a_user:make", **asked)
    assert done.graph.classes == 5
    assert done.architecture["head"] == "1"
    assert done.input == Input(SIDE, SIDE, "shorter", "bicubic")
    assert done.licence == Licence(weights="MIT")
    assert done.capabilities.features == YES
    assert any("numbered" in line for line in done.unknown)
    save_file(torch.nn.Sequential(nn.Flatten(), nn.Linear(432, 5)).state_dict(), tmp_path / "w.safetensors")
    kept = python_code.find("python:own_nets_of_a_user:make@w.safetensors", **asked).graph.module[1].weight
    assert torch.equal(kept, torch.from_numpy(load_file(tmp_path / "w.safetensors")["1.weight"]))
    for name, said in (
        ("soft", "probabilities or their logs"),
        ("broken", "ValueError: two$"),
        ("none", "returned int, not a torch.nn.Module"),
        ("missing", "AttributeError"),
    ):
        with pytest.raises(EbjdatError, match=said):
            python_code.find(f"python:own_nets_of_a_user:{name}", **asked)
    with pytest.raises(EbjdatError, match="give a contract with height, width, resize, filter"):
        python_code.find("python:own_nets_of_a_user:make", **{**asked, "contract": None})


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (nn.Conv2d(4, 2, 1), "does not take images of \\(3, 12, 12\\)"),
        (nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (1, -1))), "not logits of two classes"),
        (nn.Sequential(nn.Flatten(), nn.Linear(432, 1)), "not logits of two classes"),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten()), "depends on the others of its batch"),
    ],
)
def test_a_module_that_is_no_classifier_of_single_images_is_refused(module, said):
    with pytest.raises(EbjdatError, match=said):
        found(
            *(module, PythonArchitecture("a:b")),
            **{"name": "n", "source": "s", "size": Input(SIDE, SIDE), "labels": None, "licence": Licence(), "reference": None},
            **{"said": [], "unknown": []},
        )


def test_a_checkpoint_of_a_known_family_is_read_from_either_format(tmp_path):
    weights = Plain(10, 1).build(3).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "net.pt")
    save_file(weights, tmp_path / "net.safetensors")
    plain = Contract(input=TOLD.input)
    for name in ("net.pt", "net.safetensors"):
        done = checkpoint.find(str(tmp_path / name), **{**ASKED, "contract": plain})
        assert (done.architecture["depth"], done.graph.classes, done.input.height) == (10, 3, SIDE)
        assert torch.equal(done.graph.head.weight, weights["head.weight"])
    with pytest.raises(EbjdatError, match="normalises its images itself"):
        checkpoint.find(str(tmp_path / "net.pt"), **ASKED)


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_hostile_checkpoints_end_in_one_line_and_run_nothing(tmp_path, capsys):
    torch.save({"a": Hostile()}, tmp_path / "code.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "none.pt").write_bytes(b"")
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "huge.pt")
    torch.save({"a": 3}, tmp_path / "number.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02" + b"0" * 2**22)
    save_file({"x": torch.zeros(3)}, tmp_path / "strange.safetensors")
    for pipe in ("pipe.pt", "pipe.safetensors"):
        os.mkfifo(tmp_path / pipe)
    for name, said in (
        *(("code.pt", "more than tensors"), ("old.pt", "more than tensors"), ("short.safetensors", "without running code")),
        *(("none.pt", "holds no weights|damaged"), ("huge.pt", "larger than the file"), ("number.pt", "is no tensor")),
        *(("list.pt", "holds no state_dict"), ("bomb.pt", "compressed"), ("strange.safetensors", "match no network family: wideresnet")),
        *(("absent.pt", "cannot be read"), ("pipe.pt", "no regular file"), ("pipe.safetensors", "no regular file")),
    ):
        with pytest.raises(EbjdatError, match=said) as refused:
            checkpoint.find(str(tmp_path / name), **ASKED)
        assert "\n" not in str(refused.value)
    assert capsys.readouterr().out == ""


def test_folders_of_hugging_face_that_bring_code_pickles_or_no_classifier_are_refused(tmp_path):
    good = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_hidden_layers": 2}

    def refused(said, config=good, processor="{}", weights="model.safetensors"):
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        (tmp_path / "preprocessor_config.json").write_text(processor)
        (tmp_path / weights).write_bytes(b"")
        with pytest.raises(EbjdatError, match=said) as error:
            hugging_face.find(str(tmp_path), **ASKED)
        assert "\n" not in str(error.value)

    refused("auto_map: what it names", {**good, "auto_map": {"AutoModel": "code.Net"}})
    refused("auto_map: code", processor='{"auto_map": {"AutoImageProcessor": "code.P"}}')
    refused("quantization_config", {**good, "quantization_config": {"x": 1}})
    wrapper = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"], "architecture": "resnet18"}
    refused("of 'timm_wrapper'", {**wrapper, "model_args": {"checkpoint_path": "evil.pt"}})  # timm would unpickle it
    refused("model_args", {**good, "parts": [{"model_args": {"checkpoint_path": "evil.pt"}}]})
    refused("backbone", {**good, "vision_config": {"backbone": "resnet18"}})
    refused("transformers_weights", {**good, "transformers_weights": "pytorch_model.bin"})
    refused("a pickle, which is never read", weights="pytorch_model.bin")
    refused("no image classifier", {**good, "architectures": ["ViTModel"]})
    refused("'num_hidden_layers' is 1000000000", {**good, "num_hidden_layers": 10**9})
    refused("'depths' has more than 1000 in all", {**good, "depths": [600, 600]})
    refused("'hidden_size' is 1000000000", {**good, "hidden_size": 10**9})
    refused("cannot be read", '{"a": NaN}')
    refused("no JSON object", "[]")
    refused("cannot be read", "[" * 100_000)
    (tmp_path / "config.json").write_text(json.dumps(good))
    for shard in ("../elsewhere.safetensors", "/etc/x.safetensors", "pytorch_model.bin"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
        with pytest.raises(EbjdatError, match="names weights that are no"):
            hugging_face.find(str(tmp_path), **ASKED)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(EbjdatError, match="is missing"):
        hugging_face.find(str(tmp_path), **ASKED)


class Processor:
    do_resize, do_center_crop, do_rescale, do_normalize, rescale_factor, resample = True, True, True, True, 1 / 255, 3
    size, crop_size, image_mean, image_std = {"shortest_edge": 256}, {"height": 224, "width": 224}, [0.5, 0.4, 0.3], 0.5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Input(224, 224, "shorter", "bicubic", 0.875, "floor")),
        ({"do_center_crop": False, "size": {"height": 96, "width": 128}}, Input(96, 128, "squash", "bicubic", 1.0, "floor")),
        ({"crop_pct": 0.875, "size": {"shortest_edge": 224}, "resample": 2}, Input(224, 224, "shorter", "bilinear", 0.875, "floor")),
        ({"crop_pct": 0.875, "size": {"shortest_edge": 384}}, Input(384, 384, "squash", "bicubic")),
        ({"do_center_crop": False}, "crops nothing"),
        ({"size": {"shortest_edge": 256, "longest_edge": 512}}, "longest_edge, shortest_edge"),
        ({"resample": 5}, "no contract has"),
    ],
)
def test_an_image_processor_becomes_a_contract_or_says_why_not(changes, expected):
    processor = type("Changed", (Processor,), changes)()
    if isinstance(expected, str):
        with pytest.raises(EbjdatError, match=expected):
            hugging_face.input_of(processor)
    else:
        given = hugging_face.input_of(processor)
        assert (given, given.frame) == (expected, expected.frame)
    assert hugging_face.normalisation_of(processor) == Normalisation(1.0, [0.5, 0.4, 0.3], [0.5, 0.5, 0.5], "rgb")


def test_what_timm_says_of_its_transforms_becomes_a_contract():
    told = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.95, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    assert timm.input_of({**told, "crop_mode": "center"}) == Input(224, 224, "shorter", "bicubic", 0.95)
    assert timm.input_of({**told, "crop_mode": "center"}).frame == (235, 235)  # floor(224 / .95)
    unequal = timm.input_of({**told, "input_size": (3, 224, 192)})
    assert (unequal.resize, unequal.filter) == ("cover", "bilinear")
    assert timm.input_of({**told, "crop_mode": "border"}).pad_colour == "#808080"
    assert timm.normalisation_of(told) == Normalisation(1.0, [0.5] * 3, [0.5] * 3)
    with pytest.raises(EbjdatError, match="crop mode odd"):
        timm.input_of({**told, "crop_mode": "odd"})
    with pytest.raises(EbjdatError, match="no name of a model"):
        timm.find("timm:hf-hub:x/y", **ASKED)


def test_the_licence_of_a_hugging_face_folder_is_that_of_its_card(tmp_path):
    assert hugging_face.card_licence(tmp_path) == ""
    (tmp_path / "README.md").write_text("---\ntags:\n- vision\nlicense: apache-2.0\n---\nlicense: mit\n")
    assert hugging_face.card_licence(tmp_path) == "apache-2.0"


def test_a_self_test_says_how_far_fp32_scores_are_from_double_and_nothing_where_that_is_not_known(caplog):
    image, label = np.float32(np.random.default_rng(0).random((3, 3, SIDE, SIDE))), np.array([-1, 0, 1])
    smooth = network("attentive")
    single, _ = score(smooth, torch.from_numpy(image), torch.from_numpy(label))
    moved = single.numpy() + np.float32(0.01) * np.abs(single.numpy()).max()
    assert 0 < rounding(smooth, image, label, single.numpy()) < 1e-5
    assert rounding(smooth, image, label, moved) == pytest.approx(0.01, rel=1e-2)
    fixed = Wrapped(FixedKernel(), CLASSES, NORMALISED, "last").eval().requires_grad_(False)
    single, _ = score(fixed, torch.from_numpy(image), torch.from_numpy(label))
    with caplog.at_level("WARNING"):
        assert rounding(fixed, image, label, single.numpy()) == 0.0
    assert "scores must agree to 1e-04: the network does not compute in double precision" in caplog.text


def test_a_checkpoint_of_tiny_tensors_that_name_an_enormous_network_allocates_nothing(tmp_path):
    weights = {name: torch.empty(16 * 5000, 0) for name in ("blocks.0.conv1.weight", "blocks.1.x", "blocks.2.x", "head.weight")}
    save_file(weights, tmp_path / "wide.safetensors")
    with pytest.raises(EbjdatError, match="its tensors are not those of a wideresnet"):
        checkpoint.find(str(tmp_path / "wide.safetensors"), **ASKED)


def test_torch_reads_the_directory_of_an_archive_that_was_judged(tmp_path):
    """Two directories: where the end says one begins, which torch takes, and before the end, which Python takes."""
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save({"a": torch.zeros(2**18)}, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in source.infolist():
            archive.writestr(part.filename, source.read(part))
    data = packed.getvalue()
    end = data.rfind(b"PK\5\6")
    size, begin = struct.unpack("<II", data[end + 12 : end + 20])
    hostile = data[begin : begin + size]
    benign, at = bytearray(hostile), 0
    while at < size:
        struct.pack_into("<H", benign, at + 10, 0)
        struct.pack_into("<II", benign, at + 20, 10, 10)  # stored, of ten bytes
        at += 46 + sum(struct.unpack("<HHH", benign[at + 28 : at + 34]))
    (tmp_path / "two.pt").write_bytes(data[:begin] + hostile + benign + data[end:])
    assert len(torch.load(tmp_path / "two.pt", weights_only=True)["a"]) == 2**18
    with pytest.raises(EbjdatError, match=r"no weights that are read|is damaged|unpacks to more"):
        checkpoint.read_tensors(tmp_path / "two.pt")


def test_weights_that_do_not_fit_are_told_by_their_tensor_and_the_fix():
    module = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert checkpoint.load_into(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), tensors, Path("w.pt"), "do").training
    for changes, said in (
        (
            {"2.weight": torch.zeros(5, 3), "2.bias": torch.zeros(5)},
            r"2.weight is 5 x 3 in the file, and 2 x 3 in the network \(and 1 more\)",
        ),
        ({"0.bias": None}, "0.bias is not in the file"),
        ({"x\x1b": torch.zeros(())}, r"x\\x1b is no tensor of the network"),
    ):
        given = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        with pytest.raises(EbjdatError, match=f"w.pt does not fit the network: {said}; do this"):
            checkpoint.load_into(module, given, Path("w.pt"), "do this")


class TimmOf:
    """What is used of timm, of a model whose last layer has four outputs by default."""

    def create_model(self, name, pretrained, num_classes=4):
        made = nn.Sequential(OrderedDict(body=nn.Linear(6, 3), head=nn.Linear(3, num_classes)))
        made.pretrained_cfg, made.num_classes = {"classifier": self.classifier}, num_classes
        return made

    def __init__(self, classifier):
        self.classifier = classifier


@pytest.mark.parametrize("named", ["head", ("head", "head_dist")])
def test_a_checkpoint_for_timm_says_its_number_of_classes(tmp_path, named):
    timm_of = TimmOf(named)
    for classes in (4, 7):
        torch.save({"state_dict": timm_of.create_model("x", pretrained=False, num_classes=classes).state_dict()}, tmp_path / "w.pt")
        assert timm.with_weights(timm_of, "x", tmp_path / "w.pt").head.out_features == classes
    weights = timm_of.create_model("x", pretrained=False).state_dict()
    for changes, said in (
        ({"head.weight": torch.zeros(1, 3)}, "head.weight is of 1 classes"),
        (
            {"body.weight": torch.zeros(3, 5)},
            "body.weight is 3 x 5 in the file, and 3 x 6 in the network; timm:NAME@FILE takes a state_dict of x",
        ),
    ):
        torch.save({**weights, **changes}, tmp_path / "w.pt")
        with pytest.raises(EbjdatError, match=said):
            timm.with_weights(timm_of, "x", tmp_path / "w.pt")
