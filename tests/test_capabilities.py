"""Bundles that lack something: no energy, no features, no gradient, no prior, no calibration. What is left is served, the rest says why."""

import json
import shutil
import threading
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from clients import classify as classify_client
from clients import screen as screen_client
from ebjdat_serve import card, load
from ebjdat_serve.bundle import Bundle
from ebjdat_serve.card import summary
from ebjdat_serve.cli import main
from ebjdat_serve.engines import load_engine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.folder_calibration import calibrate_folder
from ebjdat_serve.folder_prior import Wanted, prior_folder
from ebjdat_serve.pixels import encode_png
from ebjdat_serve.rows import FRESH, PRIOR
from ebjdat_serve.selftest import FUNCTIONS
from ebjdat_serve.server.app import build_server
from ebjdat_serve.server.endpoints.endpoint import generate_queue
from ebjdat_serve.server.problems import Problem
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.store import publish, sign
from ebjdat_serve.verification import Terms, verified
from tests.classifiers import NO_ENERGY, NO_FEATURES, NO_GRADIENT, NO_PRIOR, Tiny, folder_of, images, write
from tests.conftest import HTTP, serving, until
from training.card import rewrite

CPU = Terms(engine="onnx", device="cpu")
KINDS = {
    "plain": {"features": False},
    "features": {},
    "gradient": {"gradient": True},
    "probabilities": {"output": "probabilities", "features": False},
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    home = tmp_path_factory.mktemp("tiny")
    return {name: write(home / name, version=f"1-{name}", **given) for name, given in KINDS.items()}


def copied(bundle, folder):
    shutil.copytree(bundle.path, folder)
    return Bundle.draft(folder)


def unit(n=5):
    return np.ascontiguousarray((images(n, (12, 10), 3) / np.float32(255)).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_has_is_verified_and_computes_what_the_network_does(bundles, kind):
    bundle, net, image = bundles[kind], Tiny.of(4), unit()
    found = verified(bundle.path, CPU, FUNCTIONS)
    assert found.calibrated is None
    assert ("not calibrated" if kind == "gradient" else NO_GRADIENT) in found.no_check
    engine = load_engine(bundle, "onnx", "cpu")
    logits, energy, features = engine.classify(image)
    f = net.logits(image).astype(np.float64)
    lse = np.log(np.exp(f).sum(1))
    np.testing.assert_allclose(logits, f - lse[:, None] if kind == "probabilities" else f, rtol=1e-3, atol=1e-4)
    assert (energy is None, features is None) == (kind == "probabilities", kind in ("plain", "probabilities"))
    if energy is not None:
        np.testing.assert_allclose(energy, -lse, rtol=1e-5)
    if kind == "gradient":
        label = np.array([-1, 0, 1, 2, 3])
        np.testing.assert_allclose(engine.score(image, label)[0], net.score(image, label)[0], rtol=1e-3, atol=1e-6)


def test_it_is_inspected_signed_and_published(bundles, tmp_path, capsys):
    (tmp_path / "key.pem").write_bytes(b"")
    bundle = copied(bundles["plain"], tmp_path / "bundle")
    assert main(["inspect", str(bundle.path)]) == 0
    said = capsys.readouterr().out
    assert all(text in said for text in (NO_FEATURES, NO_GRADIENT, NO_PRIOR, "calibration   none", "weights CC-BY-4.0"))
    assert main(["verify", str(bundle.path), "--engine", "onnx"]) == 0
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "key.pem").write_bytes(pem)
    sign(bundle.path, tmp_path / "key.pem", CPU)
    home = publish(bundle, tmp_path / "store", terms=CPU)
    assert (home / "bundle.json.sig").is_file()


def test_what_a_strange_manifest_says_without_end_is_cut_where_it_is_inspected(bundles):
    manifest = replace(bundles["plain"].manifest, labels=[f"label {i}" for i in range(60_000)])
    manifest = replace(manifest, provenance=replace(manifest.provenance, preset="x" * 10**6))
    labels, trained = (
        next(line for line in summary(replace(bundles["plain"], manifest=manifest)).split("\n") if name in line)
        for name in ("labels", "trained")
    )
    assert labels.endswith("label 18, label 19 and 59980 more")
    assert trained.startswith("  trained       preset xxx") and trained.endswith("… (1,000,058 characters)")
    assert len(trained) < 2100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"energy": "yes"}, "a model that gives probabilities has none"),
        ({"features": ""}, "features must be 'yes' or the reason why not"),
        ({"generate": "yes"}, "generate: it follows the energy"),
    ],
)
def test_capabilities_that_contradict_each_other_are_refused(bundles, tmp_path, given, said):
    bundle = copied(bundles["probabilities"], tmp_path / "bundle")
    data = json.loads((bundle.path / "bundle.json").read_text())
    data["capabilities"] |= given
    (bundle.path / "bundle.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match=said):
        Bundle.load(bundle.path)


def test_an_output_that_is_promised_and_not_there_is_refused(bundles, tmp_path):
    bundle = copied(bundles["plain"], tmp_path / "bundle")
    can = bundle.manifest.capabilities
    bundle = bundle.update(capabilities=type(can)(can.energy, "yes", can.gradient, can.generate))
    with pytest.raises(BundleError, match=r"classify.onnx has no output features, as bundle.json says"):
        load_engine(bundle, "onnx", "cpu")


def test_a_calibration_by_half_is_no_finished_bundle(bundles, tmp_path):
    bundle = copied(bundles["plain"], tmp_path / "bundle")
    (bundle.path / "calibration.json").write_text("[]")
    bundle = bundle.update("calibration.json")
    with pytest.raises(BundleError, match=r"not finished: views.safetensors missing"):
        Bundle.load(bundle.path)


def test_views_that_the_model_cannot_have_are_refused(bundles, tmp_path):
    """The calibration of a model with energy beside one that gives probabilities: its energy would always be 0."""
    bundle = copied(bundles["plain"], tmp_path / "bundle")
    done = calibrate_folder(bundle, folder_of(tmp_path / "images", 24), say=lambda text: None)
    can = done.manifest.capabilities
    lacking = done.update(capabilities=type(can)(NO_ENERGY, can.features, can.gradient, can.generate))
    rows = [asdict(row) | {"energies": []} for row in lacking.calibrations()]
    (lacking.path / "calibration.json").write_text(json.dumps(rows))
    lacking.update("calibration.json")
    with pytest.raises(BundleError, match="the view energy needs what the model does not have"):
        verified(lacking.path, CPU)


def test_the_card_needs_no_figures_and_says_what_is_lacking(bundles, tmp_path):
    bundle = card.write_card(copied(bundles["probabilities"], tmp_path / "bundle"))
    text = (bundle.path / "README.md").read_text(encoding="utf-8")
    for said in (NO_ENERGY, NO_FEATURES, NO_GRADIENT, NO_PRIOR, "| weights | CC-BY-4.0 |", "no threshold is guessed", "-max log p(y|x)"):
        assert said in text
    assert Bundle.load(bundle.path).manifest.files["README.md"]
    again = rewrite(bundle)  # the laboratory's command: no samples of a model that draws nothing
    assert (again.path / "README.md").read_text(encoding="utf-8") == text
    assert "samples.png" not in again.manifest.files


def test_a_bundle_that_draws_nothing_has_no_workers_for_it_and_check_reach_ends_the_start(bundles):
    server, _ = build_server(Settings(bundles["plain"].path))
    assert list(server._counts) == ["/tiny/classify"]
    assert list(build_server(Settings(bundles["gradient"].path))[0]._counts) == ["/tiny/classify", "/tiny/generate"]
    with pytest.raises(BundleError, match=r"not calibrated.*serve --check none serves it"):
        open_bundle(bundles["gradient"].path, Settings(check="reach"))


def test_of_a_server_that_began_without_workers_it_is_said():
    service = SimpleNamespace(settings=Settings(), generate_queue=None)
    capable = SimpleNamespace(lacks=lambda _: "", name="model@2")
    with pytest.raises(Problem, match="it was started with a model that cannot, without workers for it; restart it") as refused:
        generate_queue(service, capable, "generate", "draws")
    assert refused.value.status == 409


# A running server of a store ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(bundles, tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    publish(bundles["plain"], home / "store", terms=CPU)
    with serving(home / "store", home / "log", "--device", "cpu", "--refresh-interval", "0.1") as live:
        live.store = home / "store"
        yield live


def served(server, bundle):
    """Have the server serve a bundle."""
    name = f"{bundle.manifest.name}@{bundle.manifest.version}"
    home = server.store / name.replace("@", "-")
    if not home.exists():
        publish(bundle, server.store, terms=CPU)
    elif (server.store / "current").resolve() != home:
        assert main(["rollback", str(server.store), home.name, "--engine", "onnx"]) == 0
    until(lambda: server.info()["model"] == name)
    return name


PICTURE = encode_png(images(1, (30, 21), 9)[0])


def test_classify_says_null_where_nothing_is_known(server, bundles):
    served(server, bundles["plain"])
    said = HTTP.post(f"{server.url}/classify", content=PICTURE).json()
    nothing = ("p_value", "suspicious", "why", "decision", "reasons")
    assert {name: said[name] for name in nothing} == dict.fromkeys(nothing)
    assert said["suspicion"] == pytest.approx(said["energy"], rel=1e-6)  # E(x) alone, which needs no fit
    assert "margin_p_value" not in said
    assert sum(one["probability"] for one in said["top"]) == pytest.approx(1, abs=1e-5)
    energy = HTTP.post(f"{server.url}/energy", content=PICTURE).json()
    assert energy["energy"] == said["energy"]
    assert energy["energy"] == pytest.approx(-np.log(np.exp(-np.array(energy["joint_energy"])).sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/generate?class=0", NO_PRIOR), ("/explain", NO_GRADIENT), ("/classify?check=reach", NO_GRADIENT)],
)
def test_what_the_model_cannot_do_is_409_with_the_reason(server, bundles, path, reason):
    served(server, bundles["plain"])
    refused = HTTP.post(f"{server.url}{path}", content=b"" if "generate" in path else PICTURE)
    assert (refused.status_code, refused.json()["title"]) == (409, "Not with this model")
    assert reason in refused.json()["detail"]


def test_info_index_and_docs_say_it(server, bundles):
    served(server, bundles["plain"])
    info = server.info()
    assert info["calibration"] is None
    assert "not calibrated" in info["ood_score"]
    assert info["capabilities"] == {"energy": "yes", "features": NO_FEATURES, "gradient": NO_GRADIENT, "generate": NO_PRIOR}
    assert info["licence"] == {"code": "MIT", "weights": "CC-BY-4.0", "data": "of the owner"}
    assert (info["output"], info["input"]["height"], info["input"]["width"]) == ("logits", 12, 10)
    paths = HTTP.get(f"{server.url}/").json()["paths"]
    assert not [path for path in paths if path.startswith(("/generate", "/explain"))]
    assert "/classify" in paths
    schema = HTTP.get(f"{server.url}/openapi.json").json()
    assert "409" in schema["paths"]["/energy"]["post"]["responses"]
    assert HTTP.get(f"{server.url}/health").json()["status"] == "ok"


def test_probabilities_have_no_energy_and_their_score_is_max_softmax(server, bundles):
    served(server, bundles["probabilities"])
    said = HTTP.post(f"{server.url}/classify", content=PICTURE).json()
    assert said["energy"] is None
    assert said["suspicion"] == pytest.approx(-np.log(said["probability"]), rel=1e-4)
    refused = HTTP.post(f"{server.url}/energy", content=PICTURE)
    assert (refused.status_code, NO_ENERGY in refused.json()["detail"]) == (409, True)
    assert server.info()["ood_score"].startswith("-max log p(y|x): not calibrated")
    assert "/energy" not in HTTP.get(f"{server.url}/").json()["paths"]


def test_with_a_gradient_it_is_explained_without_a_calibration(server, bundles):
    served(server, bundles["gradient"])
    said = HTTP.post(f"{server.url}/explain?format=json&radius=8", content=PICTURE)
    assert said.status_code == 200, said.text
    assert said.json()["valid"] is True
    assert said.json()["counterfactual"]["suspicious"] is None
    assert NO_PRIOR in HTTP.get(f"{server.url}/generate?class=0").json()["detail"]


@pytest.fixture(scope="module")
def drawing(tmp_path_factory):
    """A model with a prior of two of its three classes."""
    home = tmp_path_factory.mktemp("drawing")
    bundle = write(home / "bundle", size=(40, 36), labels=("x", "y", "z"), version="1-drawing", gradient=True, steps=True)
    return prior_folder(bundle, folder_of(home / "photos", 24, labels=("x", "z")), wanted=Wanted(steps=6, chains=20), say=lambda text: None)


def test_with_a_prior_it_draws_the_classes_that_it_is_of_and_without_none(server, bundles, drawing):
    served(server, bundles["gradient"])
    assert HTTP.get(f"{server.url}/generate?class=0").status_code == 409
    served(server, drawing)
    (drawn,) = HTTP.get(f"{server.url}/generate?class=z&seed=2&format=json").json()["images"]
    model = load(drawing.path, device="cpu")
    (image,) = model.generate("z", seed=2).images
    assert drawn == json.loads(image.model_dump_json(by_alias=True, exclude_unset=True)) and drawn["label"] == "z"
    with pytest.raises(EbjdatError, match="nothing is drawn of class 'y': no prior was fitted to it"):
        model.generate("y")
    png = HTTP.get(f"{server.url}/generate?class=2&n=2")
    assert (png.status_code, png.headers["X-Class"], png.headers["Content-Type"]) == (200, "2", "image/png")
    for method in ("GET", "POST"):
        refused = HTTP.request(method, f"{server.url}/generate?class=y")
        assert (refused.status_code, refused.json()["title"]) == (409, "Not with this model")
        assert "nothing is drawn of class 'y': no prior was fitted to it" in refused.json()["detail"]
    assert HTTP.get(f"{server.url}/generate?class=w").status_code == 422
    info = server.info()
    assert (info["capabilities"]["generate"], info["prior"]["images"], info["sampler"]["steps"]) == ("yes", [12, 0, 12], 6)
    assert [row["dataset"] for row in info["metrics"]] == [FRESH, FRESH, PRIOR]
    served(server, bundles["gradient"])
    assert NO_PRIOR in HTTP.get(f"{server.url}/generate?class=0").json()["detail"]
    assert server.info()["prior"] is None


def test_the_client_says_what_there_is(server, bundles):
    served(server, bundles["probabilities"])
    with classify_client.httpx2.Client(base_url=server.url) as client, (server.log.parent / "x.png").open("wb") as file:
        file.write(PICTURE)
        file.flush()
        line = classify_client.classify(client, Path(file.name))
        _, counted, status = screen_client.report(client, {Path(file.name): ""}, 1)
    assert "energy" not in line
    assert "SUSPICIOUS" not in line
    assert (counted.endswith("1 not judged, since the model is not calibrated"), status) == (True, 0)


def switched_under_load(server, bundles, labels):
    """Serve each bundle in turn while clients ask; return the statuses by path, and check that each answer is of one model alone."""
    over, statuses, wrong = threading.Event(), {}, []

    def ask(path):
        while not over.is_set():
            answer = HTTP.get(f"{server.url}{path}") if "generate" in path else HTTP.post(f"{server.url}{path}", content=PICTURE)
            statuses.setdefault(path, set()).add(answer.status_code)
            if answer.status_code == 200:
                said = answer.json()
                if not {one["label"] for one in said.get("top", [])} <= set(labels[said["model"]]):
                    wrong.append(said)
                if len(said.get("joint_energy", labels[said["model"]])) != len(labels[said["model"]]):
                    wrong.append(said)
            elif answer.status_code != 409:
                wrong.append((path, answer.status_code, answer.text))

    paths = ("/classify", "/energy", "/explain?format=json", "/generate?class=2&steps=2&format=json")
    threads = [threading.Thread(target=ask, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    try:
        for bundle in bundles:
            served(server, bundle)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
    return statuses


def test_a_refresh_between_sizes_labels_and_capabilities_under_load(server, bundles, drawing, tmp_path):
    other = write(tmp_path / "other", size=(23, 31), labels=("x", "y", "z"), version="2-other", gradient=True, seed=5)
    labels = {f"tiny@{b.manifest.version}": b.manifest.labels for b in (*bundles.values(), other, drawing)}
    statuses = switched_under_load(server, [bundles["probabilities"], other, bundles["plain"], drawing, other], labels)
    assert statuses["/classify"] == {200}
    assert statuses["/energy"] == statuses["/explain?format=json"] == {200, 409}
    assert statuses["/generate?class=2&steps=2&format=json"] == {200, 409}


@pytest.mark.slow
def test_a_refresh_from_the_shipped_network_to_a_tiny_one_and_back_under_load(server, bundles):
    labels = {f"tiny@{b.manifest.version}": b.manifest.labels for b in bundles.values()}
    shipped = Bundle.load(SHIPPED)
    labels[f"{shipped.manifest.name}@{shipped.manifest.version}"] = shipped.manifest.labels
    statuses = switched_under_load(server, [shipped, bundles["probabilities"], shipped], labels)
    assert statuses["/classify"] == {200}
    for path in ("/energy", "/explain?format=json", "/generate?class=2&steps=2&format=json"):
        assert statuses[path] == {200, 409}
