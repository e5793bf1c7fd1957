"""The Helm chart: what it renders is what Kubernetes knows, names what paged has, and refuses what is misspelled.
Skipped where Helm is not installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from paged_backend.frontend.metrics import FAMILIES

CHART = Path(__file__).parents[3] / "docker" / "helm" / "paged"
SCHEMA_VERSION = "1.33.0"
COMMAND = shutil.which("helm")
# no schema of theirs is in Kubernetes' own
OWN_KINDS = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "InferencePool"}

VALUES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "without a router": {"router": {"enabled": False}},
    "volumes of their own": {"cache": {"size": "100Gi", "storageClass": "fast"}, "replicas": 3},
    "a shared volume": {"cache": {"existingClaim": "models"}},
    "hpa": {"autoscaling": {"kind": "hpa"}},
    "keda": {"autoscaling": {"kind": "keda", "prometheusAddress": "http://prometheus:9090"}, "cache": {"size": "1Gi"}},
    "watched": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "p"}},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "a pool of the inference extension": {"inferencePool": {"enabled": True, "endpointPicker": "picker"}},
    "everything else": {
        "options": {"max_model_len": 8192, "page_size": 32},
        "huggingFaceTokenSecret": "hub",
        "otlpTracesEndpoint": "http://collector.monitoring:4318",
        "apiKey": {"existingSecret": "keys"},
        "image": {"pullSecrets": ["registry"], "tag": "1"},
        "networkPolicy": {
            "from": [{"namespaceSelector": {}}],
            "monitoringFrom": [{"podSelector": {"matchLabels": {"a": "b"}}}],
        },
        "nodeSelector": {"gpu": "h100"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "router": {"tokenizer": "/models/m"},
    },
}


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    """
    Raises:
        ValueError: the chart refuses the values.
    """
    if COMMAND is not None:
        done = subprocess.run(
            [COMMAND, "template", "paged", str(CHART), "-f", "-"],
            input=json.dumps(values),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(done.stderr)
        texts = [done.stdout]
    else:
        helm = pytest.importorskip("helm_python", reason="neither helm nor helm-python-sdk is installed")
        try:
            chart = helm.Chart.load(str(CHART))
            chart.validate_schema(values)
            texts = [
                text
                for path, text in chart.render(values, name="paged", namespace="default").items()
                if path.endswith(".yaml")
            ]
        except helm.HelmError as error:
            raise ValueError(str(error)) from None
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [document for document in documents if document["kind"] == kind]


@pytest.mark.parametrize("name", VALUES)
def test_what_it_renders_is_what_kubernetes_knows(name: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    documents = render(VALUES[name])
    assert documents
    for document in documents:
        assert document["metadata"]["name"].startswith("paged")
        if document["kind"] not in OWN_KINDS:
            validator.validate(document, SCHEMA_VERSION, strict=True)


def test_helm_finds_nothing_to_say() -> None:
    if COMMAND is not None:
        done = subprocess.run([COMMAND, "lint", "--strict", str(CHART)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
        return
    helm = pytest.importorskip("helm_python", reason="neither helm nor helm-python-sdk is installed")
    report = helm.lint(str(CHART), strict=True)
    assert not report["errors"] and not [message for message in report["messages"] if message["severity"] > 1], report


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"router": {"routing": "best"}}, "routing"),
        ({"autoscaling": {"kind": "keda"}}, "prometheusAddress: keda asks Prometheus"),
        ({"inferencePool": {"enabled": True}}, "the Service of the endpoint picker"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(values)


def test_every_port_that_is_named_exists_and_the_router_finds_the_servers() -> None:
    documents = render({"options": {"page_size": 32}})
    (servers,), (router,) = [
        [one for one in of_kind(documents, "Deployment") if one["metadata"]["name"] == name]
        for name in ("paged", "paged-router")
    ]
    pods = {"server": servers["spec"]["template"], "router": router["spec"]["template"]}
    ports = {
        kind: {port["name"] for container in pod["spec"]["containers"] for port in container["ports"]}
        for kind, pod in pods.items()
    }
    for service in of_kind(documents, "Service"):
        selected = service["spec"]["selector"]
        component = selected["app.kubernetes.io/component"]
        assert selected.items() <= pods[component]["metadata"]["labels"].items()
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports[component]
    for policy in of_kind(documents, "NetworkPolicy"):
        component = policy["spec"]["podSelector"]["matchLabels"]["app.kubernetes.io/component"]
        assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} <= ports[component]
    (routing,) = router["spec"]["template"]["spec"]["containers"]
    url = next(argument for argument in routing["args"] if argument.startswith("--url="))
    headless = next(one for one in of_kind(documents, "Service") if one["spec"].get("clusterIP") == "None")
    assert url == f"--url=dns://{headless['metadata']['name']}:8001"
    server = servers["spec"]["template"]["spec"]["containers"][0]
    assert {"--set=kv_events=tcp://*:5557", "--set=page_size=32"} <= set(server["args"])


def test_probes_follow_the_engine() -> None:
    (servers,) = [one for one in of_kind(render({}), "Deployment") if one["metadata"]["name"] == "paged"]
    server, gateway = servers["spec"]["template"]["spec"]["containers"]
    assert server["readinessProbe"]["httpGet"]["path"] == "/v2/models/paged_llm/ready"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/health"
    assert server["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_nobody_but_the_router_reaches_what_servers_tell_of_prompts() -> None:
    (policy,) = [one for one in of_kind(render({}), "NetworkPolicy") if one["metadata"]["name"] == "paged"]
    (rule,) = [rule for rule in policy["spec"]["ingress"] if {"port": "kv-events"} in rule["ports"]]
    (peer,) = rule["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "router"


def _names(expression: str) -> set[str]:
    return set(re.findall(r"\b(paged_\w+)", expression))


def _known_names() -> set[str]:
    pytest.importorskip("prometheus_client")
    from paged_client.cluster.cluster_client import ClusterClient
    from paged_client.cluster.gateway import ClusterCollector
    from paged_client.openai.metrics import GatewayMetrics

    metrics = GatewayMetrics(())
    metrics.registry.register(ClusterCollector(lambda: {"m": ClusterClient([], model="m", routing="least")}))
    names = {family.name for family in FAMILIES}
    for family in metrics.registry.collect():
        names |= {family.name, f"{family.name}_total"}
    return names | {f"{name}_bucket" for name in names}


@pytest.mark.parametrize("name", ["alerts.yml", "dashboard.json"])
def test_dashboard_and_alerts_ask_for_metrics_that_exist(name: str) -> None:
    said = yaml.safe_load((CHART / "files" / name).read_text())  # JSON is YAML
    if name == "alerts.yml":
        expressions = [rule["expr"] for group in said["groups"] for rule in group["rules"]]
    else:
        expressions = [target["expr"] for panel in said["panels"] for target in panel.get("targets", ())]
        expressions += [
            variable["query"]["query"] for variable in said["templating"]["list"] if variable["type"] == "query"
        ]
    asked = set().union(*map(_names, expressions))
    assert len(expressions) > 5
    assert asked <= _known_names(), asked - _known_names()


def test_the_readme_has_every_value() -> None:
    def paths(values: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for key, value in values.items():
            inner = isinstance(value, dict) and value and key not in ("resources", "gatewayResources", "labels")
            found |= paths(value, f"{prefix}{key}.") if inner else {prefix + key}
        return found

    values = yaml.safe_load((CHART / "values.yaml").read_text())
    told = set(re.findall(r"`([\w.]+)`", (CHART / "README.md").read_text()))
    assert paths(values) <= told, paths(values) - told
