"""/classify?check=reach: a walk and a search by generate workers, and a decision by three p-values, through a running server."""

import base64
import json
import shutil
from dataclasses import replace

import httpx2
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ebjdat_serve.bundle import Bundle
from ebjdat_serve.engines.ort import OnnxEngine
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.pixels import encode_png, to_unit
from ebjdat_serve.reach import RADIUS, Review, reach_score, search
from ebjdat_serve.server.app import build_server
from ebjdat_serve.server.served_model import open_bundle
from ebjdat_serve.server.settings import SHIPPED, Settings
from ebjdat_serve.verification import Terms, verified
from ebjdat_serve.view_files import REACH, load_reviewed

N = 8


@pytest.fixture(scope="module")
def images(test_images):
    return test_images[0][::62][:N]


def asked(live, images, query, path="/classify"):
    body = {"images": [base64.b64encode(encode_png(image)).decode() for image in images]}
    return httpx2.post(f"{live.url}{path}{query}", json=body, timeout=120)


def test_it_says_what_walk_and_search_find_and_decides_by_all_three(live, shipped, images):
    engine, unit = OnnxEngine(shipped, "cpu"), to_unit(images)
    score, stable = reach_score(engine, unit), search(engine, unit)
    file = shipped.path / "views.safetensors"
    clean = load_reviewed(file, "fp32", ["ood", "margin"]) | load_reviewed(file, "fp32", [REACH])
    review = Review.of({name: values[: len(clean[REACH])] for name, values in clean.items()}, None)
    assert len(clean[REACH]) == 1000
    said = asked(live, images, "?check=reach").json()["results"]
    plain = asked(live, images, "").json()["results"]
    assert 0 < sum(stable) < N  # the test sees both
    for i, (one, without) in enumerate(zip(said, plain, strict=True)):
        assert one["reach_score"] == pytest.approx(score[i], abs=2e-3)
        assert one["stable"] == bool(stable[i])
        assert one["reach_p_value"] == pytest.approx((1 + (clean[REACH] >= score[i]).sum()) / 1001, abs=5e-3)
        p = {"ood": 0, "margin": 0, "reach": one["reach_p_value"]}
        p["ood"], p["margin"] = ((1 + (clean[name][:1000] >= value).sum()) / 1001 for name, value in (
            ("ood", one["suspicion"]), ("margin", -one["margin"])
        ))  # fmt: skip
        assert one["reasons"] == [name for name, level in review.policy.levels.items() if p[name] <= level]
        assert one["decision"] == ("review" if one["reasons"] else "accept")
        assert not {"reach_score", "reach_p_value", "stable"} & set(without)
        assert {name: one[name] for name in ("label", "p_value", "margin_p_value")} == {
            name: without[name] for name in ("label", "p_value", "margin_p_value")
        }


@pytest.mark.slow
def test_one_image_and_a_radius_of_ones_own(live, shipped, images):
    engine, unit = OnnxEngine(shipped, "cpu"), to_unit(images)
    for radius in (RADIUS / 8, 8 / 255):
        stable = search(engine, unit, radius)
        said = asked(live, images, f"?check=reach&radius={radius}").json()["results"]
        assert [one["stable"] for one in said] == stable.tolist()
    one = httpx2.post(f"{live.url}/classify?check=reach", content=encode_png(images[0]), timeout=60).json()
    assert one["reach_score"] == pytest.approx(asked(live, images[:1], "?check=reach").json()["results"][0]["reach_score"], abs=1e-3)
    assert one["model"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("?check=all", "check"),
        ("?check=reach&radius=0", "radius"),
        ("?check=reach&radius=nan", "radius"),
        ("?check=reach&radius=1e9", "radius"),
        ("?radius=0.01", "radius is of check=reach"),
        ("?chek=reach", "chek"),
        ("?check=reach&check=none", "once"),
        ("?check=reach&radius=1e-40", "radius"),
        ("?" + "&".join(f"a{i}=1" for i in range(500)), "parameters"),
    ],
)
def test_what_cannot_be_checked_for_is_said(live, images, query, said):
    answer = asked(live, images[:1], query)
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert said in answer.json()["detail"]


def test_a_bad_image_in_a_list_is_named_and_nothing_is_computed(live, images):
    body = {"images": [base64.b64encode(encode_png(images[0])).decode(), base64.b64encode(b"no image").decode()]}
    answer = httpx2.post(f"{live.url}/classify?check=reach", json=body, timeout=60)
    assert (answer.status_code, answer.json()["index"]) == (422, 1)


def test_a_server_that_checks_all_needs_workers_for_gradients():
    with pytest.raises(EbjdatError, match=r"--check reach takes gradients.*--generate-workers 1"):
        build_server(Settings(model=SHIPPED, check="reach", generate_workers=0))


@pytest.mark.parametrize(("given", "said"), [({"precision": "bf16"}, "not calibrated for bf16"), ({"review_share": 0.002}, "3 views")])
def test_a_server_that_checks_all_refuses_a_bundle_that_it_could_not_check(given, said, shipped, tmp_path):
    shutil.copytree(shipped.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "calibration.json"
    every = json.loads(file.read_text())
    (bf16,) = (each for each in every if each["precision"] == "bf16")
    bf16["reach_steps"] = 0  # calibrated without the walk
    file.write_text(json.dumps(every))
    home = Bundle.draft(file.parent).update(file.name).path
    assert said in open_bundle(home, Settings(**given)).no_check  # served, but for check=reach
    with pytest.raises(BundleError, match=f"{said}.*serve --check none"):
        open_bundle(home, Settings(check="reach", **given))


@pytest.mark.parametrize(
    ("name", "scores", "said"),
    [
        ("ood", lambda s: s + 100, "are not the scores of calibration.json"),
        ("margin", lambda s: s * np.float32(np.nan), "must be finite"),
        ("margin", lambda s: s.astype(np.float64), "fp32"),
        ("margin", lambda s: s[:-1], "different numbers of images"),
        ("ood", lambda s: s.reshape(-1, 2), "must be finite scores"),
        ("ood", lambda s: np.full_like(s, np.nan), "must be finite scores"),
    ],
)
def test_scores_that_a_policy_cannot_rest_on_are_refused(shipped, tmp_path, name, scores, said):
    shutil.copytree(shipped.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "views.safetensors"
    tensors = load_file(file)
    key = f"fp32.reviewed.{name}"
    save_file({**tensors, key: np.ascontiguousarray(scores(tensors[key]))}, file)
    Bundle.draft(file.parent).update(file.name)
    with pytest.raises(BundleError, match=said):
        verified(file.parent, Terms())


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("fp32.statistics.mean", lambda a: np.stack([a, a]), "cannot be opened|arrays of wrong shapes"),
        ("fp32.statistics.mean", lambda a: np.stack([a, a, a]), "cannot be opened|arrays of wrong shapes"),
        ("fp32.features.within", lambda a: np.full_like(a, np.inf), r"features\.within must be finite"),
        ("fp32.logits.weight", lambda a: a.astype(np.int64), r"logits\.weight must be finite floating-point"),
    ],
)
def test_arrays_that_no_fit_has_written_are_refused_wherever_a_bundle_is_opened(shipped, tmp_path, key, change, said):
    shutil.copytree(shipped.path, tmp_path / "bundle")
    file = tmp_path / "bundle" / "views.safetensors"
    tensors = load_file(file)
    save_file({**tensors, key: np.array(change(tensors[key]), order="C")}, file)
    Bundle.draft(file.parent).update(file.name)
    with pytest.raises(BundleError, match=said):
        verified(file.parent, Terms(), ("classify",))


def test_reviewed_names_what_there_is(shipped, tmp_path):
    rows = json.loads((shipped.path / "calibration.json").read_text(encoding="utf-8"))
    for names in (["margin"], ["reach"], ["ood", "ood"], []):
        (tmp_path / "calibration.json").write_text(json.dumps([{**row, "reviewed": names} for row in rows]), encoding="utf-8")
        with pytest.raises(BundleError, match="reviewed must be ood, or ood and margin"):
            replace(shipped, path=tmp_path).calibration()


def test_energy_takes_no_check(live, images):
    answer = asked(live, images[:1], "?check=reach", "/energy")
    assert (answer.status_code, answer.json()["detail"]) == (422, "check is a parameter of /classify")


def test_the_document_lists_the_parameters(live):
    parameters = httpx2.get(f"{live.url}/openapi.json").json()["paths"]["/classify"]["post"]["parameters"]
    assert {one["name"] for one in parameters} == {"check", "radius"}
    assert np.isclose(RADIUS, 2 / 255)
