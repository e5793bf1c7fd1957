"""Grammars that explode, through a real tritonserver: they are refused, and what others asked for goes on meanwhile. In
a unit: grammar/test_workers.py.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPResponse
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from tokenizers import Tokenizer

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import Server, ServerSettings
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.long]

# harmless for 150 tokens; the mask behind them takes a minute
LATE_BOMB = "7{150}((([ a-z]{0,250}){0,250}){0,250}){0,250}"
LONGEST_GAP_SECONDS = 5.0  # of an innocent stream, on a busy machine; it was 68 s when masks were made in the step


def slow_schema(name: str) -> str:
    """A schema whose compilation takes seconds, to be refused in the end."""
    return json.dumps(
        {
            "type": "object",
            "properties": {
                f"p{name}_{index}": {"type": "string", "pattern": "^([a-z]{1,50}){1,50}$"} for index in range(400)
            },
        }
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {"num_pages": 1000, "max_num_sequences": 24, "max_model_len": 1024}
    with served(ServerSettings(instances=1, options=options)) as running:
        yield running


def post(server: Server, verb: str, sampling: dict[str, Any], **fields: Any) -> HTTPResponse:
    body = {
        "text_input": "Once there was",
        "exclude_input_in_output": True,
        "sampling_parameters": json.dumps(sampling),
        **fields,
    }
    answer: HTTPResponse = urlopen(
        Request(f"{server.addresses.http_url}/v2/models/paged_llm/{verb}", json.dumps(body).encode()), timeout=100
    )
    return answer


def refusal(server: Server, sampling: dict[str, Any]) -> str:
    with pytest.raises(HTTPError) as caught:
        post(server, "generate", sampling, max_tokens=400)
    assert caught.value.code == 400
    error: str = json.load(caught.value)["error"]
    return error


class InnocentStream(threading.Thread):
    """Asks for endless text until it is told to stop, and notes how long it stood still at most."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self.longest_gap, self.num_tokens, self.stopping = 0.0, 0, False
        self._server = server
        self.start()

    def run(self) -> None:
        while not self.stopping:
            last = None
            with closing(
                post(self._server, "generate_stream", {"ignore_eos": True, "seed": 3}, stream=True, max_tokens=900)
            ) as answer:
                for line in answer:
                    if line.startswith(b"data: "):
                        now = time.monotonic()
                        self.longest_gap = max(self.longest_gap, now - last if last else 0.0)
                        last = now
                        self.num_tokens += 1

    def finish(self) -> None:
        self.stopping = True
        self.join(60)
        print(f"{self.num_tokens} tokens, longest gap {self.longest_gap:.2f} s")


def test_a_mask_that_takes_a_minute_is_refused_while_a_stream_goes_on(server: Server) -> None:
    seven = Tokenizer.from_file(str(demo_model_folder() / "tokenizer.json")).token_to_id("7")
    stream = InnocentStream(server)
    inside = {"logit_bias": {str(seven): 100}, "temperature": 0}
    assert refusal(server, {"guided_regex": LATE_BOMB, **inside}).startswith(
        "guided_regex: it is too slow to follow: what may come after 15"
    )
    before = stream.num_tokens
    time.sleep(0.5)
    assert stream.num_tokens > before
    stream.finish()
    assert stream.longest_gap < LONGEST_GAP_SECONDS


@pytest.mark.parametrize("salt", ["", "another"], ids=["the same caller's", "another caller's"])
def test_ten_grammars_that_take_seconds_delay_nobody_elses_by_more_than_their_first_tries(
    server: Server, salt: str
) -> None:
    with post(server, "generate", {"guided_regex": "a"}, max_tokens=4):
        pass  # the vocabulary has been read
    with ThreadPoolExecutor(10) as pool:
        hostile = [
            pool.submit(refusal, server, {"guided_json": slow_schema(f"{salt}{number}")}) for number in range(10)
        ]
        time.sleep(0.3)
        begun = time.monotonic()
        with post(
            server, "generate", {"guided_regex": f"[a-z]{{{8 + len(salt)}}}"}, max_tokens=40, cache_salt=salt
        ) as answer:
            assert len(json.load(answer)["text_output"]) == 8 + len(salt)
        took = time.monotonic() - begun
        print(f"{took:.2f} s; {sum(refused.done() for refused in hostile)} of ten were through")
        assert not all(refused.done() for refused in hostile)
        assert took < 5  # it was 28 s when grammars were compiled in their order
    assert all("too slow to follow" in refused.result() or "MiB of memory" in refused.result() for refused in hostile)
