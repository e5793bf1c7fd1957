"""What several servers add to the gateway: sessions, by a header, and numbers on its `/metrics`."""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from paged_client.cluster.cluster_client import ClusterClient, SessionHeader


class ClusterCollector(Collector):
    """Reads the cluster's numbers when they are asked for."""

    def __init__(self, client: ClusterClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        servers = GaugeMetricFamily("paged_gateway_servers", "Servers behind the gateway, by state.", labels=["state"])
        num_ready = len(self._client.servers.ready())
        servers.add_metric(["ready"], num_ready)
        servers.add_metric(["not_ready"], len(self._client.servers.all) - num_ready)
        yield servers
        outstanding = GaugeMetricFamily("paged_gateway_requests_outstanding", "Requests that a server has not answered yet.", labels=["server"])
        chosen = CounterMetricFamily("paged_gateway_requests_routed", "Requests that a server was asked.", labels=["server"])
        for server in self._client.servers.all:
            outstanding.add_metric([server.url], server.num_outstanding)
            chosen.add_metric([server.url], server.num_asked)
        yield outstanding
        yield chosen
        client = self._client
        yield CounterMetricFamily("paged_gateway_answers_resumed", "Answers that went on in another server.", value=client.num_resumed)
        yield CounterMetricFamily("paged_gateway_requests_asked_anew", "Requests that another server was asked, before a token.", value=client.num_asked_anew)


def join(app: FastAPI, registry: CollectorRegistry, client: ClusterClient) -> None:
    """Before the first request."""
    app.add_middleware(SessionHeader)
    registry.register(ClusterCollector(client))
