"""`ebjdat-serve prior` and `import --prior`: class Gaussians fitted to a folder at a low resolution, and the class agreement of chains."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import ebjdat_serve
from ebjdat_serve import cli, folder_prior
from ebjdat_serve.bundle import Bundle, write_rows
from ebjdat_serve.card import renewed, summary
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import EbjdatError
from ebjdat_serve.folder_prior import BYTES, FEWEST_CHAINS, LEAST, Wanted, areas, gaussian, prior_folder, room, told
from ebjdat_serve.pixels import encode_png, to_bytes, to_unit
from ebjdat_serve.rows import FRESH, PRIOR, Row, rows_where
from ebjdat_serve.selftest import FUNCTIONS, ROUNDING, verify_step
from ebjdat_serve.sgld import NOISE, STEPS, Chains, Prior, Sampler, enlarged, noises
from ebjdat_serve.verification import Terms, verified
from tests.classifiers import NO_GRADIENT, folder_of, images, write

CPU = Terms(engine="onnx", device="cpu")
SIZE, LABELS = (40, 36), ("ant", "bee", "cow", "dog")
SHORT = Wanted(steps=8, chains=FEWEST_CHAINS)


def quiet(text):
    pass


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 images of each class but the last, of which there are three."""
    home = folder_of(tmp_path_factory.mktemp("photos"), 48, labels=LABELS)
    for file in sorted((home / "dog").iterdir())[3:]:
        file.unlink()
    return home


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A bundle that could draw if it had a prior."""
    return write(tmp_path_factory.mktemp("bundles") / "without", size=SIZE, gradient=True, steps=True)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory, without, photos):
    """A bundle with a prior, and what was said."""
    home, lines = tmp_path_factory.mktemp("drawing") / "bundle", []
    shutil.copytree(without.path, home)
    return renewed(prior_folder(Bundle.draft(home), photos, wanted=SHORT, say=lines.append)), lines


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# the Gaussians --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 5), (32, 24), (33, 47), (53, 47)])
def test_images_are_averaged_over_areas_and_enlarged_as_pillow_does_it(size):
    plane = np.random.default_rng(0).random((53, 47), dtype=np.float32)
    high, wide = size
    low = (areas(53, high) @ plane @ areas(47, wide).T).astype(np.float32)
    fine = plane.repeat(high, axis=0).repeat(wide, axis=1)  # so that every area is of whole pixels
    np.testing.assert_allclose(low, fine.reshape(high, 53, wide, 47).mean(axis=(1, 3)), atol=1e-5)
    again = enlarged(np.stack([low] * 3)[None], 53, 47)
    np.testing.assert_allclose(again[0, 1], Image.fromarray(low).resize((47, 53), Image.Resampling.BILINEAR), atol=1e-5)


def test_a_gaussian_has_the_mean_and_leading_covariance_of_its_images():
    low = np.random.default_rng(1).random((9, 3, 2, 3), dtype=np.float32)
    mean, factor = gaussian(low, 8)
    flat, components = low.reshape(9, -1), factor.reshape(8, -1)
    np.testing.assert_allclose(mean.ravel(), flat.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(components.T @ components, np.cov(flat.T), atol=1e-6)  # nine images span eight dimensions
    three = gaussian(low, 3)[1].reshape(3, -1)
    np.testing.assert_allclose((three**2).sum(), np.linalg.eigvalsh(np.cov(flat.T))[-3:].sum(), rtol=1e-5)
    assert not gaussian(low, 20)[1][8:].any()


@pytest.mark.parametrize(
    ("classes", "weights", "side"), [(10, 2_000_000, 32), (100, 2_000_000, 24), (1000, 18_600_000, 8), (1000, 102_000_000, 16)]
)
def test_a_prior_takes_three_megabytes_or_a_tenth_of_the_weights(classes, weights, side, tmp_path):
    budget = max(BYTES, weights // 10)
    h, w, rank = room(budget - folder_prior.HEADER, classes, 224, 224, 200)
    assert (h, w) == (side, side) and 4 <= rank <= 48
    empty = Prior(np.zeros((classes, 3, h, w), np.float32), np.zeros((classes, rank, 3, h, w), np.float32), np.arange(classes), (224, 224))
    empty.save(tmp_path / "prior.safetensors")
    assert (tmp_path / "prior.safetensors").stat().st_size <= budget


def test_small_and_oblong_images_keep_their_shape_and_too_many_classes_are_refused():
    assert room(BYTES, 10, 28, 28, 200)[:2] == (28, 28)
    assert room(BYTES, 10, 320, 100, 200) == (32, 10, 48)
    assert room(BYTES, 10, 224, 224, 9)[2] == 9  # of ten images
    with pytest.raises(EbjdatError, match="a prior of 100000 classes does not fit"):
        room(BYTES, 100_000, 224, 224, 200)


def test_draws_are_of_the_requested_class_alone_and_of_the_models_size(tmp_path):
    noise = np.random.default_rng(2)
    mean, factor = noise.random((2, 3, 4, 5), dtype=np.float32), noise.normal(0, 0.05, (2, 6, 3, 4, 5)).astype(np.float32)
    Prior(mean, factor, np.array([3, 7]), (12, 10)).save(tmp_path / "p.safetensors")
    prior = Prior.load(tmp_path / "p.safetensors")
    assert prior.of([3, 7], 12, 10) and not prior.of([3, 6], 12, 10) and not prior.of([3, 7], 10, 12) and not prior.of([3], 12, 10)
    drawn = prior.sample(np.array([7, 3, 7]), noises(5, 3))
    z = np.random.default_rng(6).standard_normal(6, dtype=np.float32)
    low = mean[0] + np.tensordot(z, prior.factor[0], axes=1)
    np.testing.assert_allclose(drawn[1], enlarged(low[None], 12, 10)[0].clip(0, 1), atol=1e-6)
    np.testing.assert_array_equal(drawn[1:2], prior.sample(np.array([3]), noises(6, 1)))  # alone as among others
    for other in (0, 5, 8, -1):
        with pytest.raises(ValueError, match=f"not of class {other}"):
            prior.sample(np.array([7, other]), noises(0, 2))


# a folder -------------------------------------------------------------------------------------------------------------


def test_a_bundle_draws_after_it_and_says_of_what(drawing, without, photos):
    bundle, said = drawing
    can = bundle.manifest.capabilities
    assert (can.generate, bundle.functions) == ("yes", ("classify", "score", "step"))
    assert bundle.manifest.prior.images == [12, 12, 12, 0] and bundle.manifest.drawn == [0, 1, 2]
    assert bundle.manifest.prior.dataset.startswith("36 images of ")
    prior = Prior.load(bundle.path / "prior.safetensors")
    assert (prior.mean.shape, prior.factor.shape, prior.size) == ((3, 3, 32, 29), (3, 11, 3, 32, 29), SIZE)
    assert verified(Bundle.load(bundle.path).path, CPU, FUNCTIONS).opened.prior
    assert any("3 of 4 classes to 36 images" in line for line in said)
    assert not (without.path / "prior.safetensors").exists()


def test_agreement_is_that_of_the_pixels_that_are_served(drawing):
    bundle, _ = drawing
    m, engine, prior = bundle.manifest, load_engine(bundle, "onnx", "cpu"), Prior.load(bundle.path / "prior.safetensors")
    whole, quarter = rows_where(bundle.metrics(), "class_agreement_own", dataset=FRESH)
    (start,) = rows_where(bundle.metrics(), "class_agreement_own", dataset=PRIOR)
    label = np.resize(np.random.default_rng(0).permutation(3), FEWEST_CHAINS)
    for row, steps in ((start, 0), (quarter, 2), (whole, 8)):
        assert (row.n, row.seed, row.of, row.part) == (FEWEST_CHAINS, 0, m.files["classify.onnx"].sha256, "generation")
        chains = Chains.start(prior, m.sampler, label, 0)
        image = to_bytes((engine.advance(chains, steps) if steps else chains).image)
        assert row.value == (engine.classify(to_unit(image)).logits.argmax(1) == label).mean()
        assert row.interval[0] <= row.value <= row.interval[1]
    assert (whole.steps, whole.step_size, whole.grad_clip, whole.noise_std) == tuple(vars(m.sampler).values())
    assert whole.value > start.value  # steps on E(x, y) lead to the class
    assert f"{start.value:.3f} of the prior alone" in told(bundle)[1]


def test_the_step_is_chosen_by_the_models_own_score(drawing):
    """A step moves pixels by MOVE at the prior, and none farther than FARTHEST."""
    bundle, _ = drawing
    sampler, engine = bundle.manifest.sampler, load_engine(bundle, "onnx", "cpu")
    prior = Prior.load(bundle.path / "prior.safetensors")
    label = np.linspace(0, 2, 16).astype(np.int64)
    score, _ = engine.score(Chains.start(prior, sampler, label, 0).image, label)
    assert sampler.step_size * np.sqrt((score**2).mean()) == pytest.approx(folder_prior.MOVE, rel=0.01)
    assert sampler.step_size * sampler.grad_clip == pytest.approx(folder_prior.FARTHEST, rel=0.01)


def test_the_card_and_the_summary_say_it(drawing):
    bundle, _ = drawing
    card, said = (bundle.path / "README.md").read_text(encoding="utf-8"), summary(bundle)
    for text in (card, said):
        assert "class Gaussians of 3 of 4 classes, fitted to 36 images of" in text
    assert "of the prior alone" in card and "| class_agreement_own |" in card and "labels\nnoise as asked" in card


def test_again_it_replaces_what_was_of_the_prior_before_and_nothing_else(drawing, tmp_path, capsys):
    shutil.copytree(drawing[0].path, tmp_path / "bundle")
    bundle = Bundle.draft(tmp_path / "bundle")
    other = Row(metric="accuracy_clean", value=0.5, n=10, dataset="photos", split="test", of=bundle.measured("fp32"), seed=0)
    write_rows(bundle.path / "metrics.json", [other, *bundle.metrics()])
    bundle.update("metrics.json")
    photos = folder_of(tmp_path / "photos", 20, labels=("first", "second"))
    (tmp_path / "names.json").write_text(json.dumps({"first": "dog", "second": "2"}))
    options = ["--folders", str(tmp_path / "names.json"), "--steps", "3", "--chains", "20", "--step-size", "0.5", "--grad-clip", "1"]
    assert cli.main(["prior", str(bundle.path), str(photos), *options, "--noise-std", "0.01"]) == 0
    done = Bundle.load(bundle.path)
    assert (done.manifest.prior.images, done.manifest.sampler) == ([0, 0, 10, 10], Sampler(3, 0.5, 1.0, 0.01))
    rows = done.metrics()
    assert rows[0] == other
    assert [(row.steps, row.step_size) for row in rows[1:]] == [(3, 0.5), (1, 0.5), (None, None)]
    last = capsys.readouterr().out.splitlines()[-3:]
    assert last[0].startswith("class Gaussians of 2 of 4 classes, fitted to 20 images of photos at 32 x 29 pixels, rank 9, ")
    assert last[1].startswith("class agreement ") and last[2] == f"into {bundle.path / 'prior.safetensors'}"
    assert verified(done.path, CPU, FUNCTIONS).opened


def test_what_cannot_be_is_refused_in_a_line_and_nothing_is_written(without, photos, tmp_path):
    few = folder_of(tmp_path / "few", 2 * LEAST - 1, labels=("ant", "bee"))
    for file in list((few / "ant").iterdir())[:1]:
        file.unlink()
    unread = folder_of(tmp_path / "unread", 24, labels=("ant", "bee"))
    for file in sorted((unread / "bee").iterdir())[2:] + sorted((unread / "ant").iterdir())[:1]:
        file.write_bytes(encode_png(images(1, (9, 9))[0])[:60])
    strange = folder_of(tmp_path / "strange", 24, labels=("ant", "wasp"))
    plain, before = folder_of(tmp_path / "plain", 24), contents(without.path)
    for folder, wanted, said in (
        (few, SHORT, "no class has 10 images, which a prior takes at least: 'ant' has most, 9"),
        (folder_of(tmp_path / "none", 3), SHORT, "holds 3 images .*a prior takes 10 at least"),
        (plain, SHORT, "a prior takes labelled images; these are without labels"),
        (strange, SHORT, "1 are not named as a label, 'wasp' first"),
        (tmp_path / "nowhere", SHORT, "is not a folder"),
        (photos, replace(SHORT, steps=0), "the sampler: steps must be 1 to 10000"),
        (photos, replace(SHORT, step_size=-1.0), "the sampler: step_size must be"),
        (photos, replace(SHORT, chains=3), "class agreement takes 20 chains at least, not 3"),
    ):
        with pytest.raises(EbjdatError, match=said) as refused:
            prior_folder(without, folder, wanted=wanted, say=quiet)
        assert "\n" not in str(refused.value)
    assert contents(without.path) == before
    shutil.copytree(without.path, tmp_path / "bundle")
    for file in sorted((unread / "bee").iterdir())[2:4] + sorted((unread / "bee").iterdir())[6:]:
        file.write_bytes(encode_png(images(1, (9, 9))[0]))  # so that half can be read: eight of "bee", eleven of "ant"
    lines = []
    done = prior_folder(Bundle.draft(tmp_path / "bundle"), unread, wanted=SHORT, say=lines.append)
    assert done.manifest.prior.images == [11, 10, 0, 0] and any("left out 3 that cannot be read" in line for line in lines)


@pytest.mark.parametrize(
    ("kind", "said"), [({}, NO_GRADIENT), ({"gradient": True}, "has no step.onnx"), ({"output": "probabilities"}, "it ends in a softmax")]
)
def test_a_model_whose_chains_take_no_steps_is_refused(kind, said, tmp_path, photos, capsys):
    bundle = write(tmp_path / "bundle", **kind)
    assert cli.main(["prior", str(bundle.path), str(photos)]) == 2
    assert said in capsys.readouterr().err


def test_the_prior_of_a_training_set_stays(shipped, photos, tmp_path):
    with pytest.raises(EbjdatError, match="was trained here"):
        prior_folder(shipped, photos, say=quiet)


def test_a_step_graph_of_another_model_is_found_before_anything_is_written(without, photos, tmp_path):
    shutil.copytree(without.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "selftest.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "moved": tensors["moved"][::-1].copy()}, file)
    bundle = Bundle.draft(tmp_path / "bundle").update("selftest.safetensors")
    with pytest.raises(EbjdatError, match="self-test failed, moved"):
        prior_folder(bundle, photos, say=quiet)
    assert not (bundle.path / "prior.safetensors").exists()


def test_steps_may_be_off_as_far_as_the_scores_that_they_take(without, tmp_path):
    """Of a network with kinks: a step along a score that is off by eight times its source's rounding, then one by eight times that."""
    shutil.copytree(without.path, tmp_path / "bundle")
    file, engine = tmp_path / "bundle" / "selftest.safetensors", load_engine(without, "onnx", "cpu")
    tensors, rounding = load_file(file), np.array([5e-4], np.float32)
    most = 0.25 * (8 + 64) * rounding[0] * min(2.0, np.abs(tensors["score"]).max()) * np.abs(tensors["moved"]).max()
    off = {**tensors, "moved": tensors["moved"] + np.float32(0.9 * most)}
    assert 0.9 * most > 1e-4
    for stored, passes in (({**off, ROUNDING: rounding}, True), (off, False), ({**off, ROUNDING: rounding / 2}, False)):
        save_file(stored, file)
        if passes:
            verify_step(Bundle.draft(tmp_path / "bundle"), engine)
        else:
            with pytest.raises(EbjdatError, match="self-test failed, moved"):
                verify_step(Bundle.draft(tmp_path / "bundle"), engine)


@pytest.mark.parametrize(
    "strange",
    [
        {"classes": np.array([0, 1, 3])},
        {"size": np.array([36, 40])},
        {"size": np.array([40])},
        {"size": np.array([2**40, 2**40])},
        {"mean": np.zeros((3, 3, 32), np.float32)},
    ],
)
def test_a_prior_that_does_not_fit_is_no_part_of_the_model(drawing, tmp_path, strange):
    shutil.copytree(drawing[0].path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "prior.safetensors"
    save_file({**load_file(file), **strange}, file)
    bundle = Bundle.draft(tmp_path / "bundle").update("prior.safetensors")
    with pytest.raises(EbjdatError, match=r"not from one model|cannot be read"):
        verified(bundle.path, CPU, FUNCTIONS)


def test_a_manifest_that_tells_of_other_classes_is_refused(drawing, tmp_path):
    for number, (images_of, said) in enumerate((([1, 2], "images of 2 classes"), ([0] * 4, "no class has a prior"))):
        shutil.copytree(drawing[0].path, tmp_path / str(number))
        data = json.loads((tmp_path / str(number) / "bundle.json").read_text())
        data["prior"]["images"] = images_of
        (tmp_path / str(number) / "bundle.json").write_text(json.dumps(data))
        with pytest.raises(EbjdatError, match=said):
            Bundle.load(tmp_path / str(number))


# import ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_network_is_imported_with_a_prior_and_drawn_from(tmp_path, monkeypatch, capsys):
    """A convolution with a kink, images smaller than its own, labels by number; then again by the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net_of_a_user.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    torch.manual_seed(0)\n    return nn.Sequential("
        "nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))\n"
    )
    told = {"height": 48, "width": 40, "resize": "squash", "filter": "bilinear"}
    (tmp_path / "contract.json").write_text(json.dumps(told))
    photos = folder_of(tmp_path / "photos", 44, labels=("1", "4"))
    source = ["import", "python:net_of_a_user:make", "bundle", "--allow-code", "--contract", "contract.json"]
    assert cli.main([*source, "--prior", str(tmp_path / "empty")]) == 2
    assert not (tmp_path / "bundle").exists()
    assert cli.main([*source, "--prior", str(photos), "--license", "MIT"]) == 0
    out = capsys.readouterr().out
    assert "class Gaussians of 2 of 5 classes, fitted to 44 images of photos at 32 x 27 pixels" in out and "class agreement " in out
    bundle = Bundle.load(tmp_path / "bundle")
    sampler = bundle.manifest.sampler
    assert (sampler.steps, sampler.noise_std) == (STEPS, NOISE)
    model = ebjdat_serve.load(bundle.path, device="cpu")
    first, again = (model.generate("4", seed=1).images for _ in range(2))
    assert first == again and first[0].class_ == 4
    assert cli.main(["prior", "bundle", str(photos), "--steps", "2", "--chains", "20"]) == 0
    assert verified(tmp_path / "bundle", CPU, FUNCTIONS).bundle.manifest.sampler.steps == 2
