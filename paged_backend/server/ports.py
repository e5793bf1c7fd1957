"""The three ports of a server: given ones checked before the slow start, the others chosen and held until the server
listens.
"""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from paged_backend.errors import EngineError

_AUTO_PORTS = range(20000, 32768)  # below the range that the kernel hands to outgoing connections


@dataclass(frozen=True)
class Addresses:
    """Where a running server answers; `host` can be connected to."""

    host: str
    http_port: int
    grpc_port: int
    metrics_port: int

    @property
    def http_url(self) -> str:
        return f"http://{self.host}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """As tritonclient.grpc wants it: without a scheme."""
        return f"{self.host}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self.host}:{self.metrics_port}/metrics"


class PortClaim:
    """Three distinct ports: the given ones checked, the others chosen. Chosen ones stay bound (not listening) until
    `release`, so that another server on this machine does not choose them during the slow start.
    """

    def __init__(self, host: str, *, http: int, grpc: int, metrics: int) -> None:
        self._sockets: list[socket.socket] = []
        self.chosen: set[int] = set()
        address = resolve_host(host)
        given = {"http": http, "grpc": grpc, "metrics": metrics}
        try:
            _check_given_ports(address, given)
            ports = {service: port or self._choose(address) for service, port in given.items()}
        except BaseException:
            self.release()
            raise
        self.addresses = Addresses(
            "127.0.0.1" if address == "0.0.0.0" else address, ports["http"], ports["grpc"], ports["metrics"]
        )

    def _choose(self, address: str) -> int:
        for port in random.sample(_AUTO_PORTS, 1000):
            claim = socket.socket()
            try:
                claim.bind((address, port))
            except OSError:
                claim.close()
                continue
            # after bind: lets tritonserver bind it too, but no other claim
            claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._sockets.append(claim)
            self.chosen.add(port)
            return port
        raise EngineError(f"no free port on {address} between {_AUTO_PORTS.start} and {_AUTO_PORTS.stop}")

    def release(self) -> None:
        for claim in self._sockets:
            claim.close()
        self._sockets.clear()


def _check_given_ports(address: str, given: Mapping[str, int]) -> None:
    taken: dict[int, str] = {}
    for service, port in given.items():
        if not port:
            continue
        if port in taken:
            raise EngineError(f"--{taken[port]}-port and --{service}-port are both {port}: choose two")
        taken[port] = service
        with socket.socket() as probe:
            # connections of a server that ended do not count
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
                probe.listen(1)
            except PermissionError:
                raise EngineError(
                    f"port {port} on {address} needs root: choose another with --{service}-port"
                ) from None
            except OverflowError:
                raise EngineError(f"--{service}-port {port} is not a port number") from None
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise EngineError(
                        f"port {port} on {address} is already in use: choose another with --{service}-port"
                    ) from None
                raise EngineError(f"cannot listen on {address}: {error.strerror}") from None


def resolve_host(host: str) -> str:
    """The IPv4 address to listen on: tritonserver takes no names."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        raise EngineError(f"--host {host} is not an IPv4 address or name of this machine") from None
