"""Tests of refreshing a store under load: no request fails, each response is of one model, and invalid bundles are not served."""

import contextlib
import errno
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx2
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from ebjdat_serve import store as stores
from ebjdat_serve.bundle import MANIFEST, SIGNATURE, Bundle
from ebjdat_serve.errors import BundleError, EbjdatError
from ebjdat_serve.graphs import References, references
from ebjdat_serve.server.settings import SHIPPED
from ebjdat_serve.signing import check_signature, trusted_keys
from ebjdat_serve.store import publish, rollback, sign, versions
from tests.conftest import DIGITS, LONG, serving, until
from tests.test_faults import connect, drawing, workers


def named(bundle):
    return f"{bundle.manifest.name}@{bundle.manifest.version}"


def copied(source, folder, **changes):
    shutil.copytree(source, folder)
    return Bundle.draft(folder).update(**changes)


def info(server):
    return server.info()


@pytest.fixture(scope="module")
def _followed(tmp_path_factory, shipped):
    folder = tmp_path_factory.mktemp("followed")
    publish(shipped, folder / "store")
    with serving(folder / "store", folder / "log", *LONG, "--refresh-interval", "0.2") as server:
        yield folder / "store", server


@pytest.fixture
def followed(_followed, shipped):
    """A store and a server that follows it; a test begins and ends with the shipped model."""
    store, server = _followed
    yield _followed
    rollback(store, shipped.manifest.version)
    until(lambda: info(server)["model"] == named(shipped) and not info(server)["refresh"]["refused"], 60)
    until(lambda: info(server)["load"]["generate"]["chains"] == 0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two pairs of keys, as OpenSSL makes them."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
    return folder


def test_a_refresh_under_load_fails_no_request_and_every_answer_is_one_models(followed, golden, shipped, picture):
    """From CIFAR-10 to digits and back, with other labels and another size of image."""
    store, server = followed
    digits, kinds = Bundle.load(golden), ("classify", "generate")
    labels = {named(bundle): bundle.manifest.labels for bundle in (digits, shipped)}
    seen, wrong, stop = Counter(), [], threading.Event()

    def ask(kind):
        with httpx2.Client(timeout=60) as client:
            while not stop.wait(0.01):  # a moment for what opens the next model, on few cores
                if kind == "classify":
                    answer = client.post(f"{server.url}/classify", content=picture)
                else:
                    answer = client.get(f"{server.url}/generate", params={"class": 3, "steps": 10, "format": "json"})
                if answer.status_code != 200:
                    wrong.append(answer.text)
                    continue
                said = answer.json()
                one = said["images"][0] if kind == "generate" else said
                seen[kind, said["model"]] += 1
                if one["label"] != labels[said["model"]][one["class"]]:
                    wrong.append(said)

    def both_answer_by(bundle):
        """Wait until both kinds have been answered by a bundle some more times than until now."""
        before = dict(seen)
        until(lambda: all(seen[kind, named(bundle)] > before.get((kind, named(bundle)), 0) + 2 for kind in kinds))

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in ("classify", "classify", "classify", "generate")]
    try:
        for thread in threads:
            thread.start()
        both_answer_by(shipped)
        publish(digits, store)
        both_answer_by(digits)
        rollback(store, shipped.manifest.version)
        both_answer_by(shipped)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong
    until(lambda: info(server)["refresh"] == {"opening": None, "refused": None, "retiring": []})
    assert httpx2.get(f"{server.url}/health").status_code == 200


@pytest.mark.slow
def test_a_long_drawing_ends_on_the_model_it_began_with(followed, golden, shipped):
    store, server = followed
    answers = []
    query = {"class": 3, "n": 8, "steps": 400, "seed": 5, "format": "json"}
    thread = threading.Thread(target=lambda: answers.append(httpx2.get(f"{server.url}/generate", params=query, timeout=110).json()))
    thread.start()
    drawing(server, 8)
    publish(Bundle.load(golden), store)
    until(lambda: info(server)["model"] == named(Bundle.load(golden)))
    assert not answers
    assert info(server)["refresh"]["retiring"] == [named(shipped)]
    thread.join(120)
    assert answers[0]["model"] == named(shipped)
    assert answers[0]["images"][0]["label"] == "cat"
    until(lambda: not info(server)["refresh"]["retiring"])


@pytest.mark.slow
def test_what_is_not_right_is_refused_and_the_old_model_goes_on(tmp_path, shipped, picture):
    store = tmp_path / "store"
    first = publish(shipped, store)
    with serving(store, tmp_path / "log") as server:
        before = httpx2.post(f"{server.url}/classify", content=picture).json()

        def point(name):
            (store / "hand").symlink_to(name)
            os.replace(store / "hand", store / "current")

        def refused(what):
            until(lambda: what in ((info(server)["refresh"]["refused"] or {}).get("reason") or ""))
            assert httpx2.post(f"{server.url}/classify", content=picture).json() == before
            assert httpx2.get(f"{server.url}/health").status_code == 200

        copied(SHIPPED, store / "damaged", version="damaged")
        (store / "damaged" / "weights.safetensors").write_bytes(b"junk")
        point("damaged")
        refused("is damaged")

        bundle = copied(SHIPPED, store / "liar", version="liar")  # every hash is right, the self-test is not
        expected = load_file(bundle.path / "selftest.safetensors")
        save_file({**expected, "moved": expected["moved"][::-1].copy()}, bundle.path / "selftest.safetensors")
        bundle.update("selftest.safetensors")
        point("liar")
        refused("self-test failed")

        (store / "current").unlink()  # nothing to point at is no reason to stop either
        time.sleep(2.5)  # the server looks every second
        assert httpx2.post(f"{server.url}/classify", content=picture).json() == before

        good = publish(copied(SHIPPED, tmp_path / "good", version="good"), store)
        until(lambda: info(server)["model"].endswith("@good"))
        assert info(server)["refresh"]["refused"] is None
        # a worker that is started again serves what is served now, not what it was first started with
        shutil.rmtree(first)
        killed = workers(server)[0]
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in workers(server))  # what comes before this is noticed is lost with it
        after = httpx2.post(f"{server.url}/classify", content=picture, timeout=30).json()
        assert after == {**before, "model": f"{shipped.manifest.name}@good"}
        assert good.is_dir()


@pytest.mark.slow
def test_only_what_a_trusted_key_signed_is_served(tmp_path, keys, picture):
    bundle = copied(SHIPPED, tmp_path / "bundle", version="signed")
    command = [sys.executable, "-m", "ebjdat_serve.cli"]

    def run(*arguments):
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)

    trust = ("--trust", str(keys / "ours.pub.pem"))
    unsigned = run("serve", bundle.path, *trust)
    assert (unsigned.returncode, "is not signed" in unsigned.stderr) == (2, True)
    store = tmp_path / "store"
    assert run("publish", bundle.path, store, "--key", keys / "ours.pem").returncode == 0
    with serving(store, tmp_path / "log", "--device", "cpu", *trust) as server:
        other = copied(SHIPPED, tmp_path / "other", version="other")
        assert run("sign", other.path, "--key", keys / "theirs.pem").returncode == 0
        shutil.copytree(other.path, store / "other")
        (store / "hand").symlink_to("other")
        os.replace(store / "hand", store / "current")
        until(lambda: "by a key that serve --trust names" in ((info(server)["refresh"]["refused"] or {}).get("reason") or ""))
        assert info(server)["model"].endswith("@signed")
        refused = run("publish", other.path, store)
        assert (refused.returncode, "by a key that serve --trust names" in refused.stderr) == (2, True)
        third = copied(SHIPPED, tmp_path / "third", version="third")
        assert run("publish", third.path, store, "--key", keys / "ours.pem").returncode == 0
        until(lambda: info(server)["model"].endswith("@third"))
        assert "or give --allow-older" in run("rollback", store, "signed").stderr
        assert run("rollback", store, "signed", "--allow-older").returncode == 0
        until(lambda: info(server)["model"].endswith("@signed"))


def broken(store, name, **files):
    """A version that is wrong in one of its files, every hash as its publisher says."""
    bundle = copied(SHIPPED, store / name, version=name)
    for file, content in files.items():
        (bundle.path / file.replace("_", ".")).write_bytes(content)
        if file != "bundle_json":
            bundle = bundle.update(file.replace("_", "."))
    return bundle


@pytest.mark.slow
def test_no_bundle_however_strange_stops_the_server(followed, shipped, picture):
    store, server = followed
    rows = json.loads((SHIPPED / "calibration.json").read_text())
    nan = [{**row, "energies": [float("nan"), *row["energies"]]} for row in rows]
    unknown = [{**row, "score": "luck"} for row in rows]
    cold = [{**row, "temperature": 10**400} for row in rows]
    strange = {
        "deep": {"bundle_json": b"[" * 200_000},
        "number": {"calibration_json": b"5"},
        "nan": {"calibration_json": json.dumps(nan).encode()},
        "score": {"calibration_json": json.dumps(unknown).encode()},
        "hot": {"calibration_json": json.dumps(cold).encode()},
        "prior": {"prior_safetensors": b"junk"},
        "graph": {"classify_onnx": b"\xff" * 100},
    }
    before = httpx2.post(f"{server.url}/classify", content=picture).json()

    def point(name):
        (store / "hand").symlink_to(name)
        os.replace(store / "hand", store / "current")

    for name, files in strange.items():
        broken(store, name, **files)
        point(name)
        until(lambda name=name: name in ((info(server)["refresh"]["refused"] or {}).get("bundle") or ""))
    labels = copied(SHIPPED, store / "labels", version="labels")
    labels.update(labels=["a", "b"])
    point("labels")
    until(lambda: "not from one model" in ((info(server)["refresh"]["refused"] or {}).get("reason") or ""))
    rollback(store, shipped.manifest.version)
    until(lambda: info(server)["refresh"]["refused"] is None)
    assert httpx2.post(f"{server.url}/classify", content=picture).json() == before


def test_a_slow_upload_across_a_refresh_is_answered_by_the_new_model(followed, golden, picture):
    store, server = followed
    body = b'{"class": 3, "steps": 2, "format": "json"}'
    halves = [
        (b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(picture), picture),
        (b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body), body),
    ]
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server)) for _ in halves]
        for client, (head, content) in zip(clients, halves, strict=True):
            client.sendall(head + content[:10])
        publish(Bundle.load(golden), store)
        until(lambda: info(server)["model"] == named(Bundle.load(golden)) and not info(server)["refresh"]["retiring"])
        for client, (_, content) in zip(clients, halves, strict=True):
            client.sendall(content[10:])
            answer = http.client.HTTPResponse(client)
            answer.begin()
            assert answer.status == 200
            assert json.loads(answer.read())["model"] == named(Bundle.load(golden))
            answer.close()


@pytest.mark.slow
def test_a_worker_killed_during_a_refresh_delays_it_only(followed, tmp_path):
    store, server = followed
    publish(copied(SHIPPED, tmp_path / "next", version="next"), store)
    until(lambda: info(server)["refresh"]["opening"] or info(server)["model"].endswith("@next"))
    os.kill(workers(server)[1], signal.SIGKILL)
    until(lambda: info(server)["model"].endswith("@next"))


@pytest.mark.slow
def test_back_and_forth_while_a_drawing_runs_keeps_each_model_once(followed, tmp_path, shipped):
    store, server = followed
    publish(copied(SHIPPED, tmp_path / "other", version="other"), store)
    until(lambda: info(server)["model"].endswith("@other"))
    with connect(server) as client:
        client.sendall(b"GET /generate?class=3&n=8&steps=1000 HTTP/1.1\r\nHost: x\r\n\r\n")
        drawing(server, 8)
        for version in (shipped.manifest.version, "other", shipped.manifest.version):
            rollback(store, version)
            until(lambda version=version: info(server)["model"].endswith(f"@{version}"))
            assert len(info(server)["refresh"]["retiring"]) <= 1
        assert httpx2.get(f"{server.url}/generate", params={"class": 1, "steps": 2}, timeout=60).status_code == 200


@pytest.mark.slow
def test_signing_what_was_refused_unsigned_is_noticed(tmp_path, keys):
    store = tmp_path / "store"
    first = copied(SHIPPED, tmp_path / "first", version="first")
    publish(first, store, keys / "ours.pem")
    with serving(store / "current", tmp_path / "log", "--device", "cpu", "--trust", str(keys / "ours.pub.pem")) as server:
        assert info(server)["model"].endswith("@first")
    with serving(store, tmp_path / "log", "--device", "cpu", "--trust", str(keys / "ours.pub.pem")) as server:
        second = copied(SHIPPED, tmp_path / "second", version="second")
        shutil.copytree(second.path, store / f"{second.manifest.name}-second")
        (store / "hand").symlink_to(f"{second.manifest.name}-second")
        os.replace(store / "hand", store / "current")
        until(lambda: "is not signed" in ((info(server)["refresh"]["refused"] or {}).get("reason") or ""))
        publish(second, store, keys / "ours.pem")
        until(lambda: info(server)["model"].endswith("@second"))


# signatures ----------------------------------------------------------------------------------------------------------


def test_a_signature_is_of_these_bytes_by_one_of_these_keys(tmp_path, keys):
    bundle = copied(DIGITS, tmp_path / "bundle")
    file = keys / "ours.pub.pem"
    ours, theirs = trusted_keys([file, keys / "theirs.pub.pem"])
    sign(bundle.path, keys / "ours.pem")
    check_signature(bundle.path, [ours])
    check_signature(bundle.path, [theirs, ours])
    with pytest.raises(BundleError, match="not a signature"):
        check_signature(bundle.path, [theirs])
    (bundle.path / SIGNATURE).write_bytes(bytes(65))
    with pytest.raises(BundleError, match="64 bytes"):
        check_signature(bundle.path, [ours])
    sign(bundle.path, keys / "ours.pem")
    openssl = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", file, "-rawin", "-in", bundle.path / MANIFEST, "-sigfile"]
    subprocess.run([*openssl, bundle.path / SIGNATURE], check=True, capture_output=True)
    bundle.update(version="another")
    with pytest.raises(BundleError, match="not a signature"):
        check_signature(bundle.path, [ours])


def test_keys_of_another_kind_are_named(tmp_path, keys):
    rsa = tmp_path / "rsa.pem"
    subprocess.run(["openssl", "genpkey", "-algorithm", "rsa", "-out", rsa], check=True, capture_output=True)
    bundle = copied(DIGITS, tmp_path / "bundle")
    for key in (rsa, tmp_path / "none.pem", keys / "ours.pub.pem"):
        with pytest.raises(EbjdatError, match=key.name):
            sign(bundle.path, key)
    sign(bundle.path, keys / "ours.pem")
    with pytest.raises(EbjdatError, match=r"holds a private key.*public key") as told:
        trusted_keys([keys / "ours.pem"])
    assert "-out ours.pem" not in str(told.value)  # the advice of a command that would overwrite the key


# the store -----------------------------------------------------------------------------------------------------------


def test_rollback_goes_to_the_version_before_or_to_one_that_is_named(tmp_path):
    store = tmp_path / "store"
    homes = [publish(copied(DIGITS, tmp_path / name, version=name), store) for name in ("a", "b", "c")]
    assert versions(store) == homes
    assert (store / "current").resolve() == homes[2].resolve()
    assert rollback(store) == homes[1]
    assert rollback(store) == homes[2]  # and back again
    assert rollback(store, "a") == homes[0]
    assert (store / "current").resolve() == homes[0].resolve()
    with pytest.raises(BundleError, match="no version zebra"):
        rollback(store, "zebra")
    (homes[1] / "weights.safetensors").write_bytes(b"junk")
    with pytest.raises(BundleError, match="damaged"):
        rollback(store, "b")
    assert (store / "current").resolve() == homes[0].resolve()
    with pytest.raises(BundleError, match="cannot be changed"):
        rollback(tmp_path / "nowhere")


def test_a_full_disk_leaves_the_store_as_it_was(tmp_path, monkeypatch):
    store = tmp_path / "store"
    home = publish(copied(DIGITS, tmp_path / "a", version="a"), store)
    bundle, copy, left = copied(DIGITS, tmp_path / "b", version="b"), shutil.copyfile, [3]

    def full(source, target):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return copy(source, target)

    monkeypatch.setattr(stores.shutil, "copyfile", full)
    with pytest.raises(BundleError, match="No space left"):
        publish(bundle, store)
    assert versions(store) == [home]
    assert (store / "current").resolve() == home.resolve()
    assert not [path for path in store.iterdir() if path.name.startswith(".incoming")]


@pytest.mark.parametrize("name", ["../../outside", "/absolute", ".hidden", "a b", "", "nul\0", "\ud800"])
def test_a_name_that_is_no_name_is_published_nowhere(tmp_path, name):
    for field in ("name", "version"):
        bundle = copied(DIGITS, tmp_path / field)
        manifest = json.loads((bundle.path / MANIFEST).read_text())
        (bundle.path / MANIFEST).write_text(json.dumps({**manifest, field: name}))
        with pytest.raises(BundleError, match="not a valid name or version"):
            publish(bundle, tmp_path / "store")
        shutil.rmtree(bundle.path)


def test_what_is_published_is_read_only_and_a_dead_publishers_leavings_are_swept(tmp_path):
    store = tmp_path / "store"
    (store / ".incoming-dead").mkdir(parents=True)
    home = publish(copied(DIGITS, tmp_path / "a", version="a"), store)
    assert not (store / ".incoming-dead").exists()
    assert all(file.stat().st_mode & 0o222 == 0 for file in home.iterdir())


def test_two_publishers_take_turns(tmp_path):
    store = tmp_path / "store"
    bundles = [copied(DIGITS, tmp_path / name, version=name) for name in "abcd"]
    threads = [threading.Thread(target=publish, args=(bundle, store)) for bundle in bundles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(versions(store)) == 4
    assert Bundle.load(store).manifest.version in "abcd"


# graphs --------------------------------------------------------------------------------------------------------------


def test_references_are_what_onnx_says_they_are(shipped):
    for graph in sorted(shipped.path.glob("*.onnx")):
        model = onnx.load(graph, load_external_data=False)
        tensors = [entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
        found = references(graph.read_bytes())
        assert found.files == set(tensors) == {"weights.safetensors"}
        assert {node.op_type for node in model.graph.node} <= found.operators


def outside(tensor):
    onnx.external_data_helper.set_external_data(tensor, "../../etc/passwd")
    tensor.ClearField("raw_data")
    return tensor


def hidden_in_a_branch(model):
    tensor = outside(onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True))
    branch = onnx.helper.make_graph([], "branch", [], [], [tensor])
    model.graph.node.append(onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))


def hidden_in_a_constant(model):
    tensor = outside(onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True))
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["k"], value=tensor))


def plain(model):
    model.graph.initializer.append(
        outside(onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True))
    )


def test_a_tag_too_long_for_other_readers_is_refused():
    """A reader of 32 bits sees external data where one of 64 sees an unknown field."""
    tensor = outside(onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], np.zeros(1, np.float32).tobytes(), raw=True))
    plain_, tag = tensor.SerializeToString(), bytes([13 << 3 | 2])

    def model(content):
        graph = bytes([5 << 3 | 2, len(content)]) + content
        return bytes([7 << 3 | 2, len(graph)]) + graph

    assert references(model(plain_)).files == {"../../etc/passwd"}
    with pytest.raises(ValueError, match="no such field"):
        references(model(plain_.replace(tag, bytes([tag[0] | 128, 128, 128, 128, 16]))))


def compiled(model):
    model.graph.node.append(onnx.helper.make_node("EPContext", ["x"], ["z"], domain="com.microsoft", ep_cache_context="engine.bin"))


@pytest.mark.parametrize(
    ("change", "said"),
    [(plain, "etc/passwd"), (hidden_in_a_branch, "etc/passwd"), (hidden_in_a_constant, "etc/passwd"), (compiled, "compiled engine")],
)
def test_a_graph_that_takes_from_elsewhere_is_refused(tmp_path, change, said):
    bundle = copied(SHIPPED, tmp_path / "bundle")
    graph = bundle.path / "classify.onnx"
    model = onnx.load(graph, load_external_data=False)
    change(model)
    graph.write_bytes(model.SerializeToString())
    bundle.update("classify.onnx")  # the hash is right, as a publisher with bad intent would have it
    with pytest.raises(BundleError, match=said):
        Bundle.load(bundle.path)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_graph_or_a_clear_error(data):
    try:
        assert isinstance(references(data), References)
    except (ValueError, UnicodeDecodeError):
        return


def test_a_file_that_is_a_link_out_of_the_bundle_is_refused(tmp_path):
    bundle = copied(SHIPPED, tmp_path / "bundle")
    shutil.move(bundle.path / "prior.safetensors", tmp_path / "elsewhere")
    (bundle.path / "prior.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="leaves the bundle"):
        Bundle.load(bundle.path)
