"""deploy/: manifests that fit the server, alert rules and a dashboard of metrics that there are, and a real Prometheus."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from ebjdat_serve.pixels import encode_png
from ebjdat_serve.server.endpoints.metrics import COUNTERS, GAUGES, HISTOGRAMS
from ebjdat_serve.server.observer import QUIET
from ebjdat_serve.server.settings import SETTINGS, Settings
from tests.classifiers import images
from tests.conftest import DIGITS, HTTP, ROOT, Live, free_port, serving, until
from tests.test_access import new
from tests.test_install import pip

DEPLOY = ROOT / "deploy"
BASE, GPU, KSERVE = DEPLOY / "kubernetes" / "base", DEPLOY / "kubernetes" / "gpu", DEPLOY / "kserve"
RULES = DEPLOY / "prometheus" / "rules.yml"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "ebjdat.json"
VARIABLES = {one.variable: one for one in SETTINGS}
DRAIN = ("EBJDAT_DRAIN_DELAY", "EBJDAT_GRACEFUL_TIMEOUT", "EBJDAT_GENERATE_GRACEFUL_TIMEOUT")


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def expressions() -> list[str]:
    """Every query of the dashboard and of the alert rules."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += [one["expr"] for one in board["annotations"]["list"]]
    return found + [rule["expr"] for group in read(RULES)["groups"] for rule in group["rules"]]


# names -----------------------------------------------------------------------------------------------------------------------


def test_every_metric_of_the_dashboard_and_the_rules_is_one_that_the_server_writes():
    written = {f"{name}_total" for name, _, _ in COUNTERS} | {name for name, _, _ in GAUGES}
    written |= {f"{name}_{end}" for name, _, _ in HISTOGRAMS for end in ("bucket", "count", "sum")}
    labels = {label for _, _, names in [*COUNTERS, *HISTOGRAMS, *GAUGES] for label in names} | {"job", "instance", "le"}
    texts = [*expressions(), *(one.get("definition", "") for one in json.loads(DASHBOARD.read_text())["templating"]["list"])]
    used = {name for text in texts for name in re.findall(r"\bebjdat_\w+", text)}
    assert len(used) > 20
    assert used <= written
    for text in texts:
        selected = {name for inside in re.findall(r"{(.*?)}", text) for name in re.findall(r"(\w+)\s*(?:=|!)", inside)}
        assert selected <= labels, text


def test_the_dashboard_names_one_datasource_and_its_panels_do_not_overlap():
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["type"] == "row" or panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    provisioned = read(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")["datasources"]
    assert board["templating"]["list"][0]["current"]["value"] in {one["uid"] for one in provisioned}


# manifests -------------------------------------------------------------------------------------------------------------------


def containers() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """The pod's specification and our container, by manifest."""
    pod = read(BASE / "deployment.yaml")["spec"]["template"]["spec"]
    (ours,) = pod["containers"]
    predictor, runtime = read(KSERVE / "inferenceservice.yaml")["spec"]["predictor"], read(KSERVE / "servingruntime.yaml")["spec"]
    (served,) = runtime["containers"]
    return {"kubernetes": (pod, ours), "kserve": ({**runtime, **predictor}, served)}


def environments() -> dict[str, tuple[dict[str, str], float]]:
    """The server's environment, and the seconds that it gets to stop, by manifest."""
    found = {
        name: ({one["name"]: one["value"] for one in ours["env"]}, float(pod["terminationGracePeriodSeconds"]))
        for name, (pod, ours) in containers().items()
    }
    service = read(DEPLOY / "compose" / "compose.yml")["services"]["ebjdat"]
    found["compose"] = (service["environment"], float(service["stop_grace_period"].removesuffix("s")))
    unit = (DEPLOY / "systemd" / "ebjdat-serve.service").read_text(encoding="utf-8")
    said = dict(pair.split("=") for line in re.findall("^Environment=(.*)$", unit, re.M) for pair in line.split())
    found["systemd"] = (said, float(re.findall("^TimeoutStopSec=(.*)$", unit, re.M)[0]))
    return found


@pytest.mark.parametrize("name", ["kubernetes", "kserve", "compose", "systemd"])
def test_a_manifest_sets_what_the_server_has_and_gives_it_the_time_to_drain(name):
    environment, seconds = environments()[name]
    assert set(environment) <= set(VARIABLES)
    settings = Settings(**{VARIABLES[key].name: VARIABLES[key].parse(value) for key, value in environment.items()})
    assert set(DRAIN) <= set(environment)
    assert seconds >= 5 + settings.drain_delay + settings.graceful_timeout + settings.generate_graceful_timeout
    assert name == "kserve" or settings.keys  # KServe's own gateway decides there


def test_probes_are_no_traffic_to_the_alerts():
    texts = [one for one in expressions() if ("ebjdat_requests_total" in one and "5m" in one and "429|503" in one) or "500|504" in one]
    assert texts
    for text in texts:
        for left_out in re.findall(r'route!~"(.*?)"', text):
            assert left_out.split("|") == list(QUIET)
    rules = [rule["expr"] for group in read(RULES)["groups"] for rule in group["rules"]]
    assert [rule for rule in rules if "drift" in rule] == ["ebjdat_drift_alarm == 1"]  # not the jumper, which has false alarms


def test_readiness_goes_before_connections_end():
    for pod, ours in containers().values():
        probe = ours["readinessProbe"]
        delay = next(float(one["value"]) for one in ours["env"] if one["name"] == DRAIN[0])
        assert delay > probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
        assert "preStop" not in ours.get("lifecycle", {})
        assert pod["securityContext"]["runAsNonRoot"]


def test_probes_ask_what_is_answered_without_a_key(keyed):
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    paths = {ours[kind]["httpGet"]["path"] for _, ours in containers().values() for kind in kinds}
    assert paths == {"/health", "/v2/health/live", "/v2/health/ready"}
    assert {path: HTTP.get(f"{keyed.url}{path}").status_code for path in paths} == dict.fromkeys(paths, 200)


def test_a_container_is_the_images_user_without_rights_and_writes_to_tmp_alone():
    user = int(re.findall(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)[0])
    for pod, ours in containers().values():
        assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (user, user)
        assert ours["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert [one["mountPath"] for one in ours["volumeMounts"] if not one.get("readOnly")] == ["/tmp"]
        assert pod["automountServiceAccountToken"] is False


def test_everything_that_selects_the_pods_selects_them():
    deployment = read(BASE / "deployment.yaml")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = {
        "service": read(BASE / "service.yaml")["spec"]["selector"],
        "budget": read(BASE / "disruption-budget.yaml")["spec"]["selector"]["matchLabels"],
        "policy": read(BASE / "network-policy.yaml")["spec"]["podSelector"]["matchLabels"],
        "deployment": deployment["spec"]["selector"]["matchLabels"],
    }
    assert all(selector and selector.items() <= labels.items() for selector in selectors.values())
    assert {file.name for file in BASE.iterdir()} == {*read(BASE / "kustomization.yaml")["resources"], "kustomization.yaml"}


def test_one_port_is_listened_on_probed_and_scraped():
    _, ours = containers()["kubernetes"]
    (port,) = ours["ports"]
    annotations = read(BASE / "deployment.yaml")["spec"]["template"]["metadata"]["annotations"]
    environment = environments()["kubernetes"][0]
    assert annotations["prometheus.io/port"] == environment["EBJDAT_PORT"] == str(port["containerPort"])
    _, served = containers()["kserve"]
    runtime, predictor = read(KSERVE / "servingruntime.yaml")["spec"], read(KSERVE / "inferenceservice.yaml")["spec"]["predictor"]
    assert served["ports"][0]["containerPort"] == 8080 == int(environments()["kserve"][0]["EBJDAT_PORT"])
    assert {served[kind]["httpGet"]["port"] for kind in ("startupProbe", "readinessProbe", "livenessProbe")} == {8080}
    for one in (runtime, predictor):
        assert one["annotations"] == {"prometheus.kserve.io/port": "8080", "prometheus.kserve.io/path": "/metrics"}
    assert runtime["protocolVersions"] == ["v2"] == [predictor["model"]["protocolVersion"]]
    assert predictor["model"]["runtime"] == read(KSERVE / "servingruntime.yaml")["metadata"]["name"]


def test_systemd_takes_the_unit(tmp_path):
    if not (analyze := shutil.which("systemd-analyze")):
        pytest.skip("needs systemd-analyze, which comes with systemd")
    unit = (DEPLOY / "systemd" / "ebjdat-serve.service").read_text(encoding="utf-8")
    here = tmp_path / "ebjdat-serve.service"
    here.write_text(unit.replace("/opt/ebjdat/bin/ebjdat-serve", sys.executable), encoding="utf-8")
    done = subprocess.run([analyze, "verify", str(here)], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


SCHEMAS = """
import sys, yaml
import kubernetes_validate
for version in (kubernetes_validate.latest_version(), "1.29"):
    for file in sys.argv[1:]:
        for document in yaml.safe_load_all(open(file, encoding="utf-8")):
            kubernetes_validate.validate(document, version, strict=True)
            print(document["kind"])
"""


@pytest.mark.network
@pytest.mark.slow
def test_kubernetes_own_schemas_take_the_manifests(tmp_path):
    """And what kubectl makes of the overlay for GPUs, where there is a kubectl."""
    files = [file for file in BASE.glob("*.yaml") if file.name != "kustomization.yaml"]
    if kubectl := shutil.which("kubectl"):
        for folder in (BASE, GPU):
            files.append(tmp_path / f"{folder.name}.yaml")
            made = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, encoding="utf-8", check=True).stdout
            files[-1].write_text(made, encoding="utf-8")
        (deployment,) = [one for one in yaml.safe_load_all(made) if one["kind"] == "Deployment"]
        (ours,) = deployment["spec"]["template"]["spec"]["containers"]
        assert ours["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"name": "EBJDAT_DEVICE", "value": "cuda"} in ours["env"]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip(python, "kubernetes-validate")
    done = subprocess.run([python, "-c", SCHEMAS, *files], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"} == set(done.stdout.split())


def test_the_schema_of_kserve_takes_the_manifests():
    """The schemas are KServe's own: config/crd/full of its repository, a folder that KSERVE_CRDS names."""
    folder = os.environ.get("KSERVE_CRDS")
    if not folder:
        pytest.skip("needs KSERVE_CRDS, the folder config/crd/full of KServe's repository")
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema")
    for file, kind in (("inferenceservice.yaml", "inferenceservices"), ("servingruntime.yaml", "servingruntimes")):
        definition = yaml.load(
            next(Path(folder).rglob(f"serving.kserve.io_{kind}.yaml")).read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )
        document = read(KSERVE / file)
        (version,) = [one for one in definition["spec"]["versions"] if one["name"] == document["apiVersion"].split("/")[1]]
        schema = version["schema"]["openAPIV3Schema"]
        closed(schema)
        schema["properties"]["metadata"] = {"type": "object"}
        check = jsonschema.Draft202012Validator(schema)
        assert [(list(error.absolute_path), error.message) for error in check.iter_errors(document)] == []
        document["spec"]["unknown"] = 1
        assert [error.message for error in check.iter_errors(document)]


def closed(schema: Any) -> None:
    """Have a definition's schema refuse fields that it does not name, which a cluster drops without a word."""
    for one in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        closed(one)
    if isinstance(schema, dict):
        if schema.pop("x-kubernetes-int-or-string", None) is True:
            schema.pop("type", None)
        if (
            schema.get("type") == "object"
            and isinstance(schema.get("properties"), dict)
            and not schema.get("x-kubernetes-preserve-unknown-fields")
        ):
            schema.setdefault("additionalProperties", False)


# Prometheus ------------------------------------------------------------------------------------------------------------------


@dataclass
class Keyed(Live):
    secret: str

    @property
    def key(self) -> dict[str, str]:
        return {"X-API-Key": self.secret}


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> Iterator[Keyed]:
    """A server with one key, which has answered a little of everything."""
    folder = tmp_path_factory.mktemp("deploy")
    secret = new(folder / "keys.json", "all", *(word for scope in ("classify", "generate", "operate") for word in ("--scope", scope)))
    options = ("--device", "cpu", "--audit-log", str(folder / "audit"), "--keys", str(folder / "keys.json"))
    with serving(DIGITS, folder / "log", *options) as live:
        server = Keyed(**vars(live), secret=secret)
        for image in images(4, (8, 8), 3):
            assert HTTP.post(f"{live.url}/classify", content=encode_png(image), headers=server.key).status_code == 200
        assert HTTP.post(f"{live.url}/classify", content=b"no image", headers=server.key).status_code == 422
        assert HTTP.get(f"{live.url}/generate?class=1&steps=2", headers=server.key).status_code == 200
        yield server


def tool(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``; skip where there is none."""
    found = shutil.which(name, path=os.environ.get("PROMETHEUS_BIN")) or shutil.which(name)
    if not found:
        pytest.skip(f"needs {name}: Debian's package prometheus, or PROMETHEUS_BIN with the folder that holds it")
    return found


@pytest.mark.parametrize("command", [("check", "rules", "rules.yml"), ("test", "rules", "rules_test.yml")])
def test_promtool_takes_the_rules_and_each_alert_fires_on_what_it_is_for(command):
    done = subprocess.run([tool("promtool"), *command], cwd=RULES.parent, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_promtool_takes_the_metrics_of_a_live_server(keyed):
    text = HTTP.get(f"{keyed.url}/metrics", headers=keyed.key).content
    done = subprocess.run([tool("promtool"), "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.mark.slow
def test_prometheus_scrapes_a_live_server_by_our_configuration_and_takes_every_query(keyed, tmp_path):
    """The shipped configuration, but for the server's address, the file of the key and the times."""
    program, port = tool("prometheus"), free_port()
    (tmp_path / "key").write_text(f"{keyed.secret}\n", encoding="utf-8")
    shutil.copy(RULES, tmp_path / "rules.yml")
    settings = (DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    for shipped, here in (("/etc/prometheus/ebjdat.key", "key"), ("ebjdat:8000", keyed.url.removeprefix("http://")), ("15s", "200ms")):
        assert shipped in settings
        settings = settings.replace(shipped, here)
    (tmp_path / "prometheus.yml").write_text(settings, encoding="utf-8")
    command = [program, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        assert_scraped(f"http://127.0.0.1:{port}/api/v1", keyed)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        log.close()


def assert_scraped(api: str, server: Keyed) -> None:
    def asked(query: str) -> list[dict[str, Any]]:
        answer = HTTP.get(f"{api}/query", params={"query": query})
        assert answer.json()["status"] == "success", (query, answer.text)
        return answer.json()["data"]["result"]

    def up() -> bool:
        try:
            ready = HTTP.get(api.replace("/api/v1", "/-/ready")).status_code == 200
            return ready and [one["value"][1] for one in asked("up")] == ["1"]
        except httpx2.TransportError:
            return False

    until(up, 60)
    (served,) = asked('ebjdat_requests_total{route="/classify", code="200"}')
    assert served["value"][1] == "4"
    assert served["metric"]["instance"] == server.url.removeprefix("http://")
    assert sum(float(one["value"][1]) for one in asked("ebjdat_images_total")) == 4
    until(lambda: len(asked("count_over_time(up[1m]) >= 4")) == 1)
    for query in expressions():
        for variable, value in (("$__rate_interval", "1m"), ("$__range", "1h"), ("$job", ".*"), ("$instance", ".*"), ("$model", ".*")):
            query = query.replace(variable, value)
        asked(query)
    rules = HTTP.get(f"{api}/rules").json()["data"]["groups"][0]["rules"]
    assert {rule["name"] for rule in rules} == {rule["alert"] for rule in read(RULES)["groups"][0]["rules"]}
    until(lambda: all(one["health"] == "ok" for one in HTTP.get(f"{api}/rules").json()["data"]["groups"][0]["rules"]))
    assert [alert["labels"]["alertname"] for alert in HTTP.get(f"{api}/alerts").json()["data"]["alerts"]] == []
