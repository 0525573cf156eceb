"""`serve --profile public`: what a client without a key of scope operate is told, through real HTTP."""

import base64
import dataclasses
import json
import shutil
import subprocess
import sys

import httpx2
import pytest

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.server.answer.public import PUBLIC_DATASETS, PUBLIC_SCHEMAS, of_public_data, told
from ebjdat_serve.server.answer.status import Load
from ebjdat_serve.server.endpoints import ENDPOINTS
from ebjdat_serve.server.settings import SHIPPED, Settings
from tests.conftest import DIGITS, ROOT, serving
from tests.test_endpoints import check
from training.data.sources import SOURCES

SECRET = ("energy", "p_value", "suspicion", "joint_energy", "top", "alpha", "load", "metrics", "refresh", "provenance", "calibration")
"""Fields that only the full profile tells."""


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    with serving(
        SHIPPED, tmp_path_factory.mktemp("public") / "log", "--device", "cpu", "--profile", "public", "--generate-chains", "8"
    ) as server:
        yield server


def keys(value):
    """Yield every key of a JSON value, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys(inner)


def test_classify_tells_the_label_a_rounded_probability_and_suspicious(public, live, picture):
    full = httpx2.post(f"{live.url}/classify", content=picture).json()
    said = httpx2.post(f"{public.url}/classify", content=picture).json()
    assert set(said) == {"class", "label", "probability", "suspicious", "model"}
    assert {name: said[name] for name in ("class", "label", "suspicious", "model")} == {
        name: full[name] for name in ("class", "label", "suspicious", "model")
    }
    assert said["probability"] == round(full["probability"], 2) != full["probability"]
    listed = httpx2.post(f"{public.url}/classify", json={"images": [base64.b64encode(picture).decode()] * 2}).json()
    assert listed == {"results": [{name: said[name] for name in said if name != "model"}] * 2, "model": said["model"]}


def test_a_check_that_could_not_be_told_is_not_made(public, picture):
    refused = httpx2.post(f"{public.url}/classify?check=reach", content=picture)
    assert (refused.status_code, "key of scope operate" in refused.json()["detail"]) == (403, True)
    assert httpx2.post(f"{public.url}/classify?check=none", content=picture).status_code == 200


def test_energies_are_refused_with_the_profile_named(public, picture):
    refused = httpx2.post(f"{public.url}/energy", content=picture)
    assert (refused.status_code, refused.headers["content-type"]) == (403, "application/problem+json")
    assert "--profile public" in refused.json()["detail"]
    assert "scope operate" in refused.json()["detail"]


def test_info_tells_the_model_its_input_and_limits_alone(public, live, shipped):
    full, said = (httpx2.get(f"{server.url}/info").json() for server in (live, public))
    full["limits"].update(chains=8, steps=shipped.manifest.sampler.steps)  # as it is started
    assert said == {name: full[name] for name in ("model", "labels", "input", "limits")}


def test_generate_tells_no_energies_in_any_form(public, live):
    query = {"class": 3, "steps": 4, "n": 2, "seed": 1}
    full, said = (httpx2.get(f"{server.url}/generate", params={**query, "format": "json"}).json() for server in (live, public))
    assert set(said["images"][0]) == {"class", "label", "probability", "suspicious", "seed", "png"}
    for mine, theirs in zip(said["images"], full["images"], strict=True):
        assert (mine["png"], mine["seed"], mine["probability"]) == (theirs["png"], theirs["seed"], round(theirs["probability"], 2))
    png = httpx2.get(f"{public.url}/generate", params=query)
    assert "x-energy" not in png.headers
    assert "x-p-value" not in png.headers
    assert [float(one) for one in png.headers["x-probability"].split(",")] == [one["probability"] for one in said["images"]]
    events = httpx2.get(f"{public.url}/generate", params={**query, "stream": "true", "every": 2}).text.split("\n\n")
    named = [(event.split("\n")[0].removeprefix("event: "), json.loads(event.split("data: ")[1])) for event in events if "data: " in event]
    assert {kind for kind, _ in named} == {"preview", "done"}
    for kind, data in named:
        assert set(data) == ({"step", "steps", "png", "model"} if kind == "preview" else set(said))


def test_the_document_is_that_of_the_profile(public, picture):
    document = httpx2.get(f"{public.url}/openapi.json").json()
    assert set(document["paths"]) == {"/classify", "/generate", "/health", "/info", "/models"}
    text = json.dumps(document["components"]["schemas"])
    assert not [name for name in SECRET if f'"{name}"' in text]
    described = document["paths"]["/generate"]["get"]["responses"]["200"]
    assert not {"X-Energy", "X-P-Value"} & set(described["headers"])
    assert "energy" not in described["content"]["text/event-stream"]["schema"]["properties"]
    answers = {
        ("/classify", "post"): httpx2.post(f"{public.url}/classify", content=picture),
        ("/generate", "get"): httpx2.get(f"{public.url}/generate", params={"class": 3, "steps": 2, "format": "json"}),
        ("/info", "get"): httpx2.get(f"{public.url}/info"),
    }
    for (path, method), answer in answers.items():
        schema = document["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
        check(answer.json(), schema, document["components"]["schemas"])
        assert not set(keys(answer.json())) & set(SECRET)
    png = httpx2.get(f"{public.url}/generate", params={"class": 3, "steps": 2})
    assert {name for name in png.headers if name.startswith("x-")} - STATIC == {name.lower() for name in described["headers"]}
    assert httpx2.get(f"{public.url}/").json()["paths"] == ["/classify", "/generate?class=3", "/health", "/models", "/info", "/docs"]


def test_explanations_are_no_part_of_it(public, picture):
    """They are adversarial images, made on demand, with energies and exact probabilities."""
    refused = httpx2.post(f"{public.url}/explain", content=picture)
    assert refused.status_code == 403
    detail = "/explain is not part of serve --profile public: it takes a key of scope operate and explain"
    assert refused.json()["detail"] == detail
    assert "/explain" not in httpx2.get(f"{public.url}/openapi.json").json()["paths"]


STATIC = {"x-request-id", "x-content-type-options", "x-frame-options"}


def test_a_refusal_for_load_tells_no_load(public, shipped):
    query = {"class": 3, "steps": shipped.manifest.sampler.steps}
    with httpx2.stream("GET", f"{public.url}/generate", params={**query, "n": 8, "stream": "true"}) as drawing:
        chunks = drawing.iter_raw()
        next(chunks)
        refused = httpx2.get(f"{public.url}/generate", params=query)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert not [digit for digit in refused.json()["detail"] if digit.isdigit()]


@pytest.mark.slow
def test_a_key_of_scope_operate_is_told_everything(tmp_path, picture):
    keys = tmp_path / "keys.json"
    sent = {}
    for name, scopes in (("ops", ["--scope", "classify", "--scope", "operate"]), ("app", ["--scope", "classify"])):
        command = [sys.executable, "-m", "ebjdat_serve.cli", "key", "new", name, "--file", str(keys), *scopes]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        sent[name] = {"X-API-Key": done.stdout.strip()}
    options = ("--device", "cpu", "--profile", "public", "--generate-workers", "0", "--keys", str(keys))
    with serving(SHIPPED, tmp_path / "log", *options) as server:
        assert "load" in httpx2.get(f"{server.url}/info", headers=sent["ops"]).json()
        assert httpx2.post(f"{server.url}/energy", content=picture, headers=sent["ops"]).status_code == 200
        assert "energy" in httpx2.post(f"{server.url}/classify", content=picture, headers=sent["ops"]).json()
        assert "energy" not in httpx2.post(f"{server.url}/classify", content=picture, headers=sent["app"]).json()
        assert httpx2.post(f"{server.url}/energy", content=picture, headers=sent["app"]).status_code == 403
        assert httpx2.get(f"{server.url}/info").status_code == 401


def test_an_endpoint_without_a_public_answer_is_refused_and_an_answer_without_one_is_not_sent(public):
    assert [one.path for one in ENDPOINTS if not one.public] == ["/energy", "/explain", "/metrics", "/v2/stats", "/v2/models/stats"]
    with pytest.raises(KeyError):
        told(Load.model_construct(), "public")
    assert Settings(profile="public").profile_for({"scopes": frozenset({"classify", "operate"})}) == "full"
    assert Settings(profile="public").profile_for({"scopes": frozenset({"classify", "generate"})}) == "public"
    assert Settings(profile="public").profile_for({}) == "public"
    for full, one in PUBLIC_SCHEMAS.items():
        assert set(one.model_fields) <= set(full.model_fields)
        assert not set(one.model_fields) & set(SECRET)


def test_the_open_protocol_tells_labels_and_flags_alone(public, picture):
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [base64.b64encode(picture).decode()]}
    said = httpx2.post(f"{public.url}/v2/models/cifar10-small/infer", json={"inputs": [image]}).json()
    assert [one["name"] for one in said["outputs"]] == ["suspicious", "label", "class"]
    assert [one["name"] for one in httpx2.get(f"{public.url}/v2/models/cifar10-small").json()["outputs"]] == [
        "suspicious",
        "label",
        "class",
    ]
    for name in ("logits", "probabilities", "energy", "suspicion", "p_value"):
        body = {"inputs": [image], "outputs": [{"name": "label"}, {"name": name}]}
        refused = httpx2.post(f"{public.url}/v2/models/cifar10-small/infer", json=body)
        assert (refused.status_code, list(refused.json())) == (403, ["error"])
        assert "scope operate" in refused.json()["error"]
    refused = httpx2.get(f"{public.url}/v2/models/stats")
    assert (refused.status_code, list(refused.json())) == (403, ["error"])


@pytest.mark.slow
def test_a_model_of_private_data_draws_only_when_it_is_allowed(tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(DIGITS, bundle)
    (bundle / "bundle.json").chmod(0o644)
    manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    manifest["provenance"]["dataset"] = "patients"
    (bundle / "bundle.json").write_text(json.dumps(manifest), encoding="utf-8")
    for options, status in (((), 403), (("--allow-generate",), 200)):
        with serving(bundle, tmp_path / "log", "--device", "cpu", "--profile", "public", *options) as server:
            drawn = httpx2.get(f"{server.url}/generate", params={"class": 3, "steps": 2})
            assert drawn.status_code == httpx2.head(f"{server.url}/generate", params={"class": 3, "steps": 2}).status_code == status
            if status == 403:
                assert "--allow-generate" in drawn.json()["detail"]


def test_public_data_are_the_data_sets_that_training_knows_by_name():
    """A folder of images gets none of these names: training/data/datasets.py."""
    assert set(PUBLIC_DATASETS) == set(SOURCES)
    provenance = Bundle.load(DIGITS).manifest.provenance
    assert of_public_data(provenance)
    for field, value in (("dataset", "cifar10 (a folder)"), ("init_sha256", "0" * 64), ("configuration", {"extra": "mine"})):
        assert not of_public_data(dataclasses.replace(provenance, **{field: value}))


def test_the_clients_take_what_they_are_told(public, tmp_path, picture):
    (tmp_path / "a.png").write_bytes(picture)
    said = httpx2.post(f"{public.url}/classify", content=picture).json()
    for name, arguments, printed in (
        ("classify.py", [tmp_path / "a.png"], said["label"]),
        ("screen.py", [tmp_path / "a.png"], f"{said['label']},{said['probability']},,,{said['suspicious']},"),
        ("generate.py", ["3", "--steps", "2", "-o", tmp_path / "drawn.png"], "class 3"),
    ):
        command = [sys.executable, str(ROOT / "clients" / name), *map(str, arguments), "--url", public.url]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode in (0, 3), done.stderr
        assert printed in done.stdout
        assert "energy" not in "".join(done.stdout.splitlines()[1 if name == "screen.py" else 0 :])
