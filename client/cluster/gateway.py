"""What several servers add to the gateway: sessions, by a header, and numbers on its `/metrics`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_client.cluster.cluster_client import ClusterClient, SessionHeader


class ClusterCollector(Collector):
    """Reads the clusters' numbers when they are asked for: each model has its own view of the servers."""

    def __init__(self, clusters: Callable[[], Mapping[str, ClusterClient]]) -> None:
        """clusters: by model."""
        self._clusters = clusters

    def collect(self) -> Iterator[Metric]:
        servers = GaugeMetricFamily(
            "paged_gateway_servers", "Servers behind the gateway, by state.", labels=["model", "state"]
        )
        outstanding = GaugeMetricFamily(
            "paged_gateway_requests_outstanding",
            "Requests that a server has not answered yet.",
            labels=["model", "server"],
        )
        chosen = CounterMetricFamily(
            "paged_gateway_requests_routed", "Requests that a server was asked.", labels=["model", "server"]
        )
        resumed = CounterMetricFamily(
            "paged_gateway_answers_resumed", "Answers that went on in another server.", labels=["model"]
        )
        anew = CounterMetricFamily(
            "paged_gateway_requests_asked_anew",
            "Requests that another server was asked, before a token.",
            labels=["model"],
        )
        for model, client in self._clusters().items():
            num_ready = len(client.servers.ready())
            servers.add_metric([model, "ready"], num_ready)
            servers.add_metric([model, "not_ready"], len(client.servers.all) - num_ready)
            for server in client.servers.all:
                outstanding.add_metric([model, server.url], server.num_outstanding)
                chosen.add_metric([model, server.url], server.num_asked)
            resumed.add_metric([model], client.num_resumed)
            anew.add_metric([model], client.num_asked_anew)
        yield from (servers, outstanding, chosen, resumed, anew)


def join(app: FastAPI, registry: CollectorRegistry, clusters: Callable[[], Mapping[str, ClusterClient]]) -> None:
    """Before the first request. clusters: by model."""
    app.add_middleware(SessionHeader)
    registry.register(ClusterCollector(clusters))
