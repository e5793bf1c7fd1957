"""The server's numbers on the gateway's /metrics, under the names that routers know."""

from __future__ import annotations

import asyncio
import http.server
import threading
import time
from collections.abc import Iterator

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families as parse

from paged_client.openai.metrics import GatewayMetrics
from paged_client.openai.server_metrics import ServerMetrics

SAID = """# HELP paged_pages Pages
# TYPE paged_pages gauge
paged_pages{model="m",state="free",version="1"} 60
paged_pages{model="m",state="held",version="1"} 25
paged_pages{model="m",state="cached",version="1"} 15
paged_pages{model="other",state="held",version="1"} 99
# TYPE paged_pool_pages gauge
paged_pool_pages{model="m",version="1"} 100
# TYPE paged_page_size gauge
paged_page_size{model="m",version="1"} 16
# TYPE paged_max_loras gauge
paged_max_loras{model="m",version="1"} 8
# TYPE paged_requests gauge
paged_requests{model="m",state="running",version="1"} 3
paged_requests{model="m",state="waiting",version="1"} 2
nv_inference_request_success{model="m",version="1"} 7
"""


class Triton(http.server.BaseHTTPRequestHandler):
    said = SAID
    num_asked = 0

    def do_GET(self) -> None:
        Triton.num_asked += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(Triton.said.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    Triton.said, Triton.num_asked = SAID, 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Triton) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/metrics"
        server.shutdown()


def told(text: bytes) -> dict[str, tuple[dict[str, str], float]]:
    return {
        sample.name: (sample.labels, sample.value)
        for family in parse(text.decode())
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }


def test_routers_find_the_names_they_know(url: str) -> None:
    async def ask() -> bytes:
        metrics = GatewayMetrics(("/v1/completions",))
        metrics.server = ServerMetrics(url, lambda: ["m"])
        with metrics.adapter("poet"), metrics.adapter("poet"), metrics.adapter(None), metrics.adapter("chef"):
            text = await metrics.text()
        assert told(await metrics.text())["vllm:lora_requests_info"][0]["running_lora_adapters"] == "chef,poet", (
            "as fresh as the numbers beside it"
        )
        return text

    text = asyncio.run(ask())
    assert b"paged_gateway_requests_in_flight 0.0" in text
    found = told(text)
    model = {"model_name": "m", "engine": "0"}
    assert found["vllm:num_requests_running"] == (model, 3)
    assert found["vllm:num_requests_waiting"] == (model, 2)
    assert found["vllm:kv_cache_usage_perc"] == (model, 0.25)
    assert found["vllm:cache_config_info"] == (
        {"block_size": "16", "num_gpu_blocks": "100", "enable_prefix_caching": "True", "engine": "0"},
        1,
    )
    labels, seconds = found["vllm:lora_requests_info"]
    assert labels == {"running_lora_adapters": "chef,poet", "waiting_lora_adapters": "", "max_lora": "8"}
    assert abs(seconds - time.time()) < 60


def test_the_server_is_asked_again_when_its_numbers_are_old(url: str) -> None:
    async def ask() -> None:
        server = ServerMetrics(url, lambda: ["m"])
        first = await server.text()
        assert await server.text() == first and Triton.num_asked == 1
        Triton.said = SAID.replace('state="waiting",version="1"} 2', 'state="waiting",version="1"} 5')
        await asyncio.sleep(0.06)
        assert told(await server.text())["vllm:num_requests_waiting"][1] == 5

    asyncio.run(ask())


def test_while_the_server_or_the_model_is_not_there_only_the_gateways_own_are_told(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        assert await ServerMetrics(url, lambda: ["unknown"]).text() == b""
        assert await ServerMetrics("http://127.0.0.1:9/metrics", lambda: ["m"]).text() == b""
        Triton.said = "<html>"
        assert await ServerMetrics(url, lambda: ["m"]).text() == b""

    asyncio.run(ask())
    assert "http://127.0.0.1:9/metrics cannot be read" in caplog.text
