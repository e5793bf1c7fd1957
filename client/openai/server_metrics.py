"""The server's numbers on the gateway's `/metrics`, under vLLM's names: NVIDIA Dynamo, llm-d and the Gateway API
inference extension read those.
"""

from __future__ import annotations

import asyncio
import logging
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client.parser import text_string_to_metric_families

_FRESH_SECONDS = 0.05  # endpoint pickers ask twenty times a second
_TIMEOUT_SECONDS = 2.0
_MAX_BYTES = 2**22
_ENGINE = "0"

log = logging.getLogger("paged.openai")

Values = Mapping[tuple[str, str], float]  # (family, state) of one model → value


class ServerMetrics:
    """Triton Server's `/metrics`, asked when the gateway's is."""

    def __init__(self, url: str, models: Callable[[], Sequence[str]]) -> None:
        """models: their names on the server, asked each time."""
        self._url = url
        self._models = models
        self._text = b""
        self._asked_at = float("-inf")
        self._asking = asyncio.Lock()
        self._adapters: Counter[str] = Counter()  # of requests in flight through this gateway

    @contextmanager
    def adapter(self, name: str | None) -> Iterator[None]:
        """A request that uses an adapter is under way."""
        if name is None:
            yield
            return
        self._adapters[name] += 1
        try:
            yield
        finally:
            self._adapters[name] -= 1

    async def text(self) -> bytes:
        """As Prometheus reads it; empty while the server does not answer."""
        async with self._asking:
            if time.monotonic() - self._asked_at > _FRESH_SECONDS:
                try:
                    self._text = self._in_vllms_words(await asyncio.to_thread(self._read))
                except (OSError, ValueError) as error:
                    log.warning("%s cannot be read: %s", self._url, error)
                    self._text = b""
                self._asked_at = time.monotonic()
        return self._text

    def _read(self) -> str:
        with urllib.request.urlopen(self._url, timeout=_TIMEOUT_SECONDS) as response:
            text: bytes = response.read(_MAX_BYTES)
        return text.decode(errors="replace")

    def _in_vllms_words(self, text: str) -> bytes:
        """A family's lines follow each other, whatever models there are, as Prometheus' format has it."""
        families: dict[str, list[str]] = {}
        for model in self._models():
            for name, description, series in self._series(model, _values_of(text, model)):
                families.setdefault(name, [f"# HELP {name} {description}", f"# TYPE {name} gauge"]).append(series)
        return "".join(f"{line}\n" for lines in families.values() for line in lines).encode()

    def _series(self, name: str, values: Values) -> Iterator[tuple[str, str, str]]:
        """(family, its description, line) of a model."""
        pages = values.get(("paged_pool_pages", ""), 0.0)
        if not pages:
            return  # the model is not loaded
        model = {"model_name": name, "engine": _ENGINE}
        # vLLM has one model, and says so in some families alone
        several = {"model_name": name} if len(self._models()) > 1 else {}
        running, waiting = (values.get(("paged_requests", state), 0.0) for state in ("running", "waiting"))
        config = {
            "block_size": f"{values.get(('paged_page_size', ''), 0):.0f}",
            "num_gpu_blocks": f"{pages:.0f}",
            "enable_prefix_caching": "True",
            "engine": _ENGINE,
            **several,
        }
        adapters = {
            "running_lora_adapters": ",".join(sorted(+self._adapters)),
            "waiting_lora_adapters": "",
            "max_lora": f"{values.get(('paged_max_loras', ''), 0):.0f}",
            **several,
        }
        held = values.get(("paged_pages", "held"), 0.0)
        yield _gauge("vllm:num_requests_running", "Requests in the engine that run.", model, running)
        yield _gauge("vllm:num_requests_waiting", "Requests in the engine that wait.", model, waiting)
        yield _gauge(
            "vllm:kv_cache_usage_perc", "Share of the pool's pages that are held; 1 is all.", model, held / pages
        )
        yield _gauge("vllm:cache_config_info", "The pool.", config, 1)
        yield _gauge(
            "vllm:lora_requests_info",
            "Adapters of requests in flight; the value is the time in seconds.",
            adapters,
            time.time(),
        )


def _values_of(text: str, model: str) -> Values:
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples if family.name.startswith("paged_") else ():
            if sample.labels.get("model") == model:
                found[sample.name, sample.labels.get("state", "")] = sample.value
    return found


def _gauge(name: str, description: str, labels: Mapping[str, str], value: float) -> tuple[str, str, str]:
    labelled = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
    return name, description, f"{name}{{{labelled}}} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
