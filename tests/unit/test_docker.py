"""docker/: what can be told without building it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from paged_backend.config import EngineConfig

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
EXTRAS = ("structured", "openai", "cluster", "bench", "tracing")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    loaded: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return loaded


def locked() -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (DOCKER / "requirements.lock").read_text(), re.MULTILINE))


def test_the_lock_has_what_the_package_and_its_extras_ask_for_and_a_hash_for_each() -> None:
    toml = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    versions, environment = locked(), {**default_environment(), "python_version": "3.12", "platform_system": "Linux"}
    for requirement in map(Requirement, wanted):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = requirement.name.lower().replace("_", "-")
            assert name in versions, f"{name}: renew the lock (docker/README.md)"
            assert requirement.specifier.contains(versions[name]), (
                f"{name} {versions[name]}: renew the lock (docker/README.md)"
            )
    assert int(versions["numpy"].split(".")[0]) >= 2
    blocks = re.split(r"^(?=\w)", (DOCKER / "requirements.lock").read_text(), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)


def test_the_image_is_no_older_than_the_security_page_asks_for() -> None:
    found = re.search(r"Take (\d+)\.(\d+) or newer", (ROOT / "docs" / "security.md").read_text())
    tag = re.search(r"^ARG TRITON_SERVER_TAG=(\d+)\.(\d+)-py3$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert found is not None and tag is not None
    assert tuple(map(int, tag.groups())) >= tuple(map(int, found.groups()))
    assert f"TRITON_SERVER_TAG:-{tag[1]}.{tag[2]}-py3" in (DOCKER / "compose.yaml").read_text()


def test_compose_has_server_and_gateway_that_are_restarted_and_closed_to_networks(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"server", "gateway", "prometheus", "grafana", "jaeger"}
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "HF_TOKEN" in services["server"]["environment"]
    assert any(word.startswith("--model=") for word in services["server"]["command"])
    assert services["gateway"]["environment"]["PAGED_API_KEY"].startswith("${PAGED_API_KEY:?")


def test_compose_lets_the_server_have_several_gpus(compose: dict[str, Any]) -> None:
    server = compose["services"]["server"]
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == "${PAGED_NUM_GPUS:-1}"
    for option in ("tensor_parallel_size", "replicas"):
        default = EngineConfig.model_fields[option].default
        assert f"--set={option}=${{PAGED_{option.upper()}:-{default}}}" in server["command"]


def test_prometheus_asks_services_that_are_there(compose: dict[str, Any]) -> None:
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]
    hosts = [target.split(":")[0] for job in jobs for group in job["static_configs"] for target in group["targets"]]
    assert set(hosts) <= set(compose["services"])


def test_compose_mounts_files_that_are_there(compose: dict[str, Any]) -> None:
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert "./helm/paged/files/dashboard.json" in mounted and "./helm/paged/files/alerts.yml" in mounted
    assert all((DOCKER / path).exists() for path in mounted)


def test_every_variable_of_compose_is_told() -> None:
    variables = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    assert variables == set(re.findall(r"^\| `([A-Z_]+)` \|", (DOCKER / "README.md").read_text(), re.MULTILINE))


def test_the_collector_of_the_tracing_profile_is_the_one_that_the_pages_name(compose: dict[str, Any]) -> None:
    """It starts only when asked for, and both that send spans have the same variable."""
    assert [name for name, service in compose["services"].items() if service.get("profiles") == ["tracing"]] == [
        "jaeger"
    ]
    senders = [
        name
        for name, service in compose["services"].items()
        if any("${PAGED_OTLP:-}" in word for word in service.get("command", ()))
    ]
    assert senders == ["server", "gateway"]
    assert (
        "PAGED_OTLP=http://jaeger:4318 docker compose -f docker/compose.yaml --profile tracing up"
        in (ROOT / "docs" / "tracing.md").read_text()
    )
