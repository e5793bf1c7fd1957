"""The server's metrics during a run."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from paged_client.bench.pool import PoolSample, PoolWatch, pool_figures, read_metrics

PAGE = """# HELP paged_pages Pages of the pool by state
# TYPE paged_pages gauge
paged_pages{model="mine",state="held",version="1"} 12
paged_pages{model="mine",state="cached",version="1"} 3
paged_pages{model="other",state="held",version="1"} 99
paged_pages_total{model="mine",version="1"} 64
paged_page_size{model="mine",version="1"} 16
paged_utilisation{model="mine",version="1"} 0.75
paged_requests{model="mine",state="running",version="1"} 5
paged_requests{model="mine",state="waiting",version="1"} 2
paged_preemptions_total{model="mine",version="1"} 4
paged_requests_finished_total{model="mine",reason="length",version="1"} 30
paged_requests_finished_total{model="mine",reason="invalid",version="1"} 5
nv_inference_request_success{model="mine",version="1"} 40
nv_inference_request_success{model="mine",version="2"} 2
nv_inference_request_success{model="third",version="1"} 9
nv_inference_request_failure{model="third",version="1"} 1
nv_cpu_utilization 0.5
"""


@pytest.fixture
def url() -> Iterator[str]:
    """A metrics page."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    server.server_close()


def sample(held: float, utilisation: float, running: float = 1, waiting: float = 0) -> PoolSample:
    return PoolSample(0.0, held, 0.0, 64, 16, utilisation, running, waiting)


def test_only_the_models_own_series_count_and_versions_add_up(url: str) -> None:
    metrics = read_metrics(url, "mine")
    assert metrics["paged_pages{held}"] == 12
    assert metrics["nv_inference_request_success"] == 42
    assert metrics["nv_cpu_utilization"] == 0.5
    assert "paged_utilisation" not in read_metrics(url, "third")


def test_the_watch_samples_what_the_page_says(url: str) -> None:
    with PoolWatch(url, "mine") as watch:
        assert watch.num_finished == 35, "the server's own count is of requests that were taken in"
        assert watch.counters() == {"paged_preemptions_total": 4}
        time.sleep(0.5)
    first = watch.samples(0, time.time() + 1)[0]
    assert (first.pages_held, first.pages_total, first.utilisation, first.running, first.waiting) == (
        12,
        64,
        0.75,
        5,
        2,
    )
    assert watch.samples(time.time() + 1, time.time() + 2) == []


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:1/metrics", "not a url"], ids=str)
def test_a_server_without_a_page_gives_no_samples_and_no_error(url: str | None) -> None:
    with PoolWatch(url, "mine") as watch:
        time.sleep(0.15)
    assert watch.samples(0, time.time()) == []
    assert watch.num_finished == 0


def test_a_server_without_our_gauges_gives_no_pool_figures(url: str) -> None:
    with PoolWatch(url, "third") as watch:
        assert watch.num_finished == 10
        time.sleep(0.25)
    assert pool_figures(watch.samples(0, time.time() + 1), {}) is None


def test_utilisation_is_live_slots_over_held_slots_in_total() -> None:
    figures = pool_figures([sample(10, 1.0), sample(30, 0.5), sample(0, 0.0)], {})
    assert figures is not None
    # neither the mean of 1.0 and 0.5 nor counting the idle moment
    assert figures.utilisation == pytest.approx((10 + 15) / 40)
    assert (figures.pages_held_mean, figures.pages_held_max) == (20, 30)


def test_running_when_full_counts_only_moments_with_requests_waiting() -> None:
    figures = pool_figures(
        [sample(1, 1, running=2), sample(4, 1, running=8, waiting=3), sample(4, 1, running=10, waiting=1)], {}
    )
    assert figures is not None
    assert (figures.running_when_full, figures.running_max) == (9, 10)
    never_full = pool_figures([sample(1, 1)], {})
    assert never_full is not None
    assert math.isnan(never_full.running_when_full)
