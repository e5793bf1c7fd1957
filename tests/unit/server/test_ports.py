"""Ports are checked or chosen before the slow start, and two servers never choose the same."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from paged_backend.errors import EngineError
from paged_backend.server.ports import PortClaim, resolve_host


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        yield listener.getsockname()[1]


@pytest.mark.parametrize("service", ["http", "grpc", "metrics"])
def test_a_busy_port_is_refused_with_the_option_to_change(busy_port: int, service: str) -> None:
    with pytest.raises(
        EngineError, match=rf"port {busy_port} on 127\.0\.0\.1 is already in use: choose another with --{service}-port"
    ):
        PortClaim("127.0.0.1", **({"http": 0, "grpc": 0, "metrics": 0} | {service: busy_port}))


def test_one_port_for_two_services_is_refused() -> None:
    with pytest.raises(EngineError, match="--http-port and --metrics-port are both 20123"):
        PortClaim("127.0.0.1", http=20123, grpc=0, metrics=20123)


def test_claims_that_are_held_never_share_a_port_and_tritonserver_can_still_listen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # few, so that claims would collide
    monkeypatch.setattr("paged_backend.server.ports._AUTO_PORTS", range(20000, 20012))
    monkeypatch.setattr("random.sample", lambda ports, count: list(ports))
    claims = [PortClaim("127.0.0.1", http=0, grpc=0, metrics=0) for _ in range(2)]
    assert len(claims[0].chosen | claims[1].chosen) == 6
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", claims[0].addresses.http_port))
        server.listen(1)
    for claim in claims:
        claim.release()


def test_addresses_of_a_server_on_every_network_can_be_connected_to() -> None:
    claim = PortClaim("0.0.0.0", http=0, grpc=0, metrics=0)
    claim.release()
    assert claim.addresses.http_url == f"http://127.0.0.1:{claim.addresses.http_port}"
    assert claim.addresses.grpc_url == f"127.0.0.1:{claim.addresses.grpc_port}"


def test_a_host_is_resolved_or_refused() -> None:
    assert resolve_host("localhost") == "127.0.0.1"
    with pytest.raises(EngineError, match="--host no-such-host.invalid"):
        resolve_host("no-such-host.invalid")


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(EngineError, match=r"cannot listen on 192\.0\.2\.1"):
        PortClaim("192.0.2.1", http=20123, grpc=0, metrics=0)
