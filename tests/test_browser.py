"""Tests of the graphs in a browser: clients/browser's page in a headless Chromium, against ONNX Runtime on the same machine."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ebjdat_serve import pixels
from ebjdat_serve.detection import Detector, probabilities
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.folder_prior import Wanted, prior_folder
from ebjdat_serve.sgld import Chains, Prior, Sampler, enlarged
from ebjdat_serve.views import Seen
from tests.classifiers import NO_ENERGY, NO_PRIOR, Tiny, folder_of, images, softmax, write
from tests.conftest import ROOT

HOME = ROOT / "clients" / "browser"
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
MISSING = [
    fix
    for there, fix in (
        (CHROMIUM.is_file(), f"a Chromium at {CHROMIUM}: apt-get install chromium, or set CHROMIUM to another"),
        (shutil.which("node"), "Node.js 20 or newer on the PATH"),
        ((HOME / "node_modules").is_dir(), "onnxruntime-web and playwright-core: npm ci --prefix clients/browser"),
    )
    if not there
]
pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(MISSING), reason="needs " + "; ".join(MISSING))]
STEPS, CAT = 5, 150


def check(bundle, picture, *options, home=HOME):
    command = ["node", str(home / "check.mjs"), str(bundle), str(picture), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def engine(shipped):
    return OnnxEngine(shipped, "cpu")


@pytest.fixture(scope="module")
def prior(shipped):
    return Prior.load(shipped.path / "prior.safetensors")


@pytest.fixture(scope="module")
def chains(shipped, prior):
    """One chain as it is served; one on the marginal energy, with so much noise that a wrong draw of it would show."""
    served = Chains.start(prior, shipped.manifest.sampler, np.array([3]), 7)
    return Chains.join([served, Chains.at(served.image, Sampler(STEPS, 0.5, 1.0, 0.1), np.array([-1]), 8)])


@pytest.fixture(scope="module")
def z(prior):
    return np.random.default_rng(0).standard_normal(prior.factor.shape[1], dtype=np.float32)


@pytest.fixture(scope="module")
def picture(tmp_path_factory, test_images):
    file = tmp_path_factory.mktemp("browser") / "cat.png"
    file.write_bytes(pixels.encode_png(test_images[0][CAT]))
    return file


@pytest.fixture(scope="module")
def page(shipped, picture, chains, z):
    """What the page computed and showed."""
    given = picture.with_name("chains.json")
    flat = {name: array.ravel().tolist() for name, array in chains.arrays().items()}
    given.write_text(json.dumps({"label": 4, "z": z.tolist(), "chains": flat}))
    done = check(shipped.path, picture, "--chains", given, "--steps", STEPS)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    print(f"\nin Chromium {answer['browser']}: {answer['timing']}, {sum(answer['downloads'].values()) / 2**20:.1f} MiB")
    return answer


def near(found, wanted):
    found, wanted = np.ravel(found), np.ravel(wanted)
    return np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_picture_of_the_models_size_is_read_as_it_is(page, test_images):
    seen = np.reshape(page["seen"], (32, 32, 4))
    assert (seen[..., :3] == test_images[0][CAT]).all()
    assert (seen[..., 3] == 255).all()


def test_logits_and_energy_are_the_servers(page, engine, test_images):
    logits, energy, _ = engine.classify(pixels.to_unit(test_images[0][[CAT]]))
    assert near(page["classified"]["logits"], logits)
    assert near(page["classified"]["energy"], energy)
    assert np.argmax(page["classified"]["logits"]) == logits.argmax()


def test_the_page_shows_what_the_server_would_say(page, shipped, engine, test_images):
    image = pixels.to_unit(test_images[0][[CAT]])
    logits, energy, features = engine.classify(image)
    calibration, combination = shipped.calibration(), shipped.combination()
    detector = Detector(np.array(calibration.scores), 0.05)
    terms = combination.terms(Seen(image, features, logits))
    p_value = detector.p_value(combination.score(terms))
    shown = page["shown"]
    assert shown["label"] == shipped.manifest.labels[logits.argmax()]
    assert float(shown["probability"]) == pytest.approx(probabilities(logits, calibration.temperature).max(), abs=1e-3)
    assert float(shown["energy"].removesuffix(" nats")) == pytest.approx(energy[0], abs=1e-3)
    assert float(shown["p_value"]) == pytest.approx(p_value[0], abs=2e-3)
    assert shown["suspicious"] == (f"yes ({combination.why(terms)[0]})" if detector.suspicious(p_value)[0] else "no")


def test_chains_take_the_servers_steps(page, engine, chains):
    energies = [engine.score(engine.advance(chains, s).image, chains.label)[1] for s in range(STEPS)]
    assert near(page["energies"], energies)
    moved = engine.advance(chains, STEPS)
    assert np.abs(np.array(page["image"]) - moved.image.ravel()).max() <= 1e-4
    assert page["step"] == moved.step.tolist() == [STEPS, STEPS]


def test_a_chain_starts_from_the_prior(page, prior, z):
    start = (prior.mean[4] + np.tensordot(z, prior.factor[4], axes=1)).clip(0, 1)
    assert np.abs(np.array(page["place"]) - start.ravel()).max() <= 1e-5


def test_a_seed_repeats_itself(page):
    assert page["seeds"] == {"same": [True, True], "other": [False, False]}  # image, key


def test_draw_draws(page):
    drawn = page["drawn"]
    assert drawn["taken"] == "12 of 12"
    assert drawn["last"] < drawn["first"]
    canvas = np.reshape(drawn["pixels"], (32, 32, 4))[..., :3]
    assert canvas.std() > 5
    assert (canvas == pixels.to_bytes(np.reshape(page["redrawn"], (1, 3, 32, 32)))[0]).all()
    assert "the model calls it" in drawn["verdict"]


def test_a_model_that_lacks_energy_calibration_and_prior_says_so(tmp_path):
    bundle = write(tmp_path / "bundle", output="probabilities", features=False)
    (tmp_path / "a.png").write_bytes(pixels.encode_png(images(1, (12, 10), 9)[0]))
    done = check(bundle.path, tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    f = Tiny.of(4).logits(pixels.to_unit(images(1, (12, 10), 9)))
    assert near(np.exp(said["classified"]["logits"]), softmax(f))
    shown = said["shown"]
    assert (shown["energy"], shown["p_value"], shown["suspicious"]) == (NO_ENERGY, "not calibrated", "not calibrated")
    assert float(said["shown"]["probability"]) == pytest.approx(softmax(f).max(), abs=1e-3)
    assert said["drawn"]["verdict"] == f"This model draws nothing: {NO_PRIOR}."


def test_a_prior_of_some_classes_at_a_low_resolution_is_drawn_from_as_the_server_does(tmp_path):
    bundle = write(tmp_path / "bundle", size=(40, 36), gradient=True, steps=True)
    photos = folder_of(tmp_path / "photos", 36, labels=("ant", "bee", "dog"))
    bundle = prior_folder(bundle, photos, wanted=Wanted(steps=6, chains=20), say=lambda text: None)
    (tmp_path / "a.png").write_bytes(pixels.encode_png(images(1, (40, 36), 9)[0]))
    prior, z = Prior.load(bundle.path / "prior.safetensors"), np.random.default_rng(0).standard_normal(11, dtype=np.float32)
    chains = Chains.start(prior, bundle.manifest.sampler, np.array([3]), 7)
    flat = {name: array.ravel().tolist() for name, array in chains.arrays().items()}
    (tmp_path / "chains.json").write_text(json.dumps({"label": 3, "z": z.tolist(), "chains": flat}))
    done = check(bundle.path, tmp_path / "a.png", "--chains", tmp_path / "chains.json", "--steps", 6)
    assert done.returncode == 0, done.stderr
    low = prior.mean[2] + np.tensordot(z, prior.factor[2], axes=1)
    found = np.array(json.loads(done.stdout)["place"])
    assert np.abs(found - enlarged(low[None], 40, 36).clip(0, 1).ravel()).max() <= 1e-5


def test_a_damaged_bundle_is_refused_by_name(shipped, picture, tmp_path):
    broken = tmp_path / "bundle"
    shutil.copytree(shipped.path, broken)
    weights = bytearray((broken / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "weights.safetensors").write_bytes(weights)
    done = check(broken, picture)
    assert done.returncode == 1
    assert "weights.safetensors is damaged" in done.stderr


def test_another_host_is_not_reached(shipped, picture, tmp_path):
    elsewhere = tmp_path / "browser"
    elsewhere.mkdir()
    for name in ("check.mjs", "index.html"):
        shutil.copyfile(HOME / name, elsewhere / name)
    (elsewhere / "node_modules").symlink_to(HOME / "node_modules")
    page = (elsewhere / "index.html").read_text().replace("connect-src 'self'", "connect-src *")
    (elsewhere / "index.html").write_text(page.replace("</header>", "<script>fetch('http://192.0.2.1/').catch(() => 0)</script></header>"))
    done = check(shipped.path, picture, home=elsewhere)
    assert done.returncode == 1
    assert "another host: http://192.0.2.1/" in done.stderr


def test_nothing_names_a_registry():
    lock = json.loads((HOME / "package-lock.json").read_text())
    wanted = json.loads((HOME / "package.json").read_text())
    assert all("resolved" not in entry for entry in lock["packages"].values())
    assert all("integrity" in entry for name, entry in lock["packages"].items() if name)
    for name, version in {**wanted["dependencies"], **wanted["devDependencies"]}.items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
