"""Networks that timm and transformers build, imported for real where these load; neither is in the development environment."""

import json
import resource
import urllib.request
from importlib import import_module

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ebjdat_serve import cli
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.importing import import_model
from ebjdat_serve.importing.images import made
from ebjdat_serve.pixels import encode_png
from tests.conftest import serving

pytestmark = [pytest.mark.network, pytest.mark.slow]
NET = "test_resnet"
"""The smallest residual network of timm, made for tests: 160 pixels, 0.47 million parameters."""


def loaded(name):
    """Return a package that loads here; skip with the reason where it does not."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # torchvision's wheel raises RuntimeError beside another torch
        pytest.skip(f"{name} does not load here: {error}")


def ten_classes(timm, folder):
    """Return the file of a checkpoint of ten classes of a model of timm that has a thousand."""
    torch.manual_seed(0)
    save_file(timm.create_model(NET, pretrained=False, num_classes=10).state_dict(), folder / "ten.safetensors")
    return folder / "ten.safetensors"


def test_a_model_of_timm_is_imported_verified_and_served_with_as_many_classes_as_its_checkpoint_has(tmp_path, capsys):
    timm = loaded("timm")
    file = ten_classes(timm, tmp_path)
    assert cli.main(["import", f"timm:{NET}@{file}", str(tmp_path / "bundle")]) == 0
    said = capsys.readouterr().out
    assert "comparing with the source's own pipeline" in said and "10 classes" in said and said.splitlines()[-1].startswith("serve it: ")
    m = Bundle.load(tmp_path / "bundle").manifest
    assert m.labels == [str(i) for i in range(10)] and m.capabilities.gradient == "yes" and m.licence.weights == "unknown"
    assert m.architecture["model"] == NET and m.input.height == 160
    assert cli.main(["verify", str(tmp_path / "bundle")]) == 0
    model = timm.create_model(NET, pretrained=False, num_classes=10).eval()
    model.load_state_dict(load_file(file))
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    picture = made(200, 300, 1)[0]
    with torch.no_grad():
        expected = torch.softmax(model(transform(Image.fromarray(picture))[None])[0], dim=0)
    with serving(tmp_path / "bundle", tmp_path / "log") as server:
        request = urllib.request.Request(f"{server.url}/classify", data=encode_png(picture))
        with urllib.request.urlopen(request, timeout=60) as answer:
            given = json.load(answer)
    assert given["class"] == int(expected.argmax()) and given["probability"] == pytest.approx(float(expected.max()), rel=1e-2)


def test_weights_of_another_model_of_timm_are_told_by_their_tensor(tmp_path):
    timm = loaded("timm")
    weights = timm.create_model(NET, pretrained=False).state_dict()
    weights["conv1.0.weight"] = torch.zeros(1, 2, 3, 3)
    save_file(weights, tmp_path / "odd.safetensors")
    with pytest.raises(
        EbjdatError, match=r"conv1.0.weight is 1 x 2 x 3 x 3 in the file, and .* in the network; .* state_dict of test_resnet"
    ):
        import_model(f"timm:{NET}@{tmp_path / 'odd.safetensors'}", tmp_path / "bundle")


def folder_of(transformers, folder, kind="vit", classes=10, **sizes):
    """Write a small network of transformers with its image processor, weights at random, as save_pretrained does."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, image_size=32, patch_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, **sizes
    )
    config.num_labels = classes
    names = {"vit": "ViTForImageClassification", "deit": "DeiTForImageClassification"}
    getattr(transformers, names[kind])(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def changed(folder, name, **values):
    """Change keys of a JSON file, None: leave out."""
    data = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("config.json", {"id2label": {"0": "a", "1": "b", "2": "c"}}, r"classifier.weight is of 10 classes, and config.json of 3: give it"),
        ("config.json", {"hidden_size": 32}, r"the weights do not fit config.json: vit\.\S+ is \S.* in the file, and .* in the network"),
        ("config.json", {"image_size": 100_000}, r"config.json asks for \d+ parameters"),
        ("config.json", {"num_hidden_layers": 1001}, "'num_hidden_layers' is 1001"),
        ("preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "does not take images of 64 x 64"),
        ("preprocessor_config.json", {"size": {"height": 10**6, "width": 10**6}}, "height must be 1 to 4096"),
    ],
)
def test_a_folder_whose_parts_do_not_fit_is_refused_in_one_line(tmp_path, name, values, said):
    folder = folder_of(loaded("transformers"), tmp_path / "net")
    changed(folder, name, **values)
    refused(folder, tmp_path, said)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"image_size": 256, "patch_size": 1}, "one image of 256 x 256 would take more than 8 GiB of memory"),
        ({"image_size": 256, "patch_size": 1, "num_attention_heads": 16}, "more than 8 GiB of memory"),
    ],
)
def test_more_tokens_than_memory_holds_are_refused_before_the_network_is_built(tmp_path, config, said):
    folder = folder_of(loaded("transformers"), tmp_path / "net")
    sizes = json.loads((folder / "config.json").read_text()) | config
    weights = load_file(folder / "model.safetensors")
    weights["vit.embeddings.position_embeddings"] = torch.zeros(1, 256**2 + 1, 16)
    weights["vit.embeddings.patch_embeddings.projection.weight"] = torch.zeros(16, 3, 1, 1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(sizes))
    changed(folder, "preprocessor_config.json", size={"height": 256, "width": 256})
    refused(folder, tmp_path, said)


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        ("efficientnet", {"depth_coefficient": 1e5}, "more than 10000 layers and parameters"),
        ("efficientnet", {"depth_coefficient": 1e300}, "'depth_coefficient' is 1e"),
        ("focalnet", {"focal_levels": [10**5] * 4}, "more than 10000 layers and parameters"),
        ("swin", {"window_size": 2000}, r"config.json asks for \d+ parameters"),
    ],
)
def test_configs_of_endless_loops_are_refused_in_one_line(tmp_path, kind, config, said):
    folder = folder_of(loaded("transformers"), tmp_path / "net")
    names = {"efficientnet": "EfficientNet", "focalnet": "FocalNet", "swin": "Swin"}
    sizes = {"model_type": kind, "architectures": [f"{names[kind]}ForImageClassification"], **config}
    (folder / "config.json").write_text(json.dumps(sizes))
    refused(folder, tmp_path, said)


def refused(folder, home, said):
    """Assert that a folder is refused in one line that says that, and that its memory was not taken."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(EbjdatError, match=said) as error:
        import_model(str(folder), home / "bundle")
    assert "\n" not in str(error.value) and not (home / "bundle").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # KiB
