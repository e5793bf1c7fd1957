"""A request as spans: their times, their names by the semantic conventions, whose children they are; and that no text
is in them.
"""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
import uuid
from itertools import pairwise

import pytest

pytest.importorskip("opentelemetry.sdk")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes

from paged_backend.config import EngineConfig
from paged_backend.frontend.delta import Delta
from paged_backend.frontend.front_end import FrontEnd
from paged_backend.frontend.request_reader import read_request
from paged_backend.frontend.spans import PHASES, Outcome, RequestSpans, Times
from paged_backend.request import Chat, Outputs, Request, SamplingParams
from paged_backend.tracing import Tracing
from tests.otlp_collector import Seen, collector
from tests.unit.frontend.test_front_end import COMMAND
from tests.unit.test_tracing import PARENT, SPAN_ID, TRACE_ID

SECRET = "SESAME"
NORMAL = Times(1.0, 1.1, 1.2, 1.5, 2.5, 2.6)


def request(**given: object) -> Request:
    asked = {
        "text": SECRET,
        "input_ids": None,
        "sampling": SamplingParams(),
        "outputs": Outputs(),
        "stream": True,
        "prepend_prompt": False,
        "arrival": 1.0,
    }
    return Request(**{**asked, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (
            NORMAL,
            [
                ("tokenize", 1.0, 1.1),
                ("queue", 1.1, 1.2),
                ("prefill", 1.2, 1.5),
                ("decode", 1.5, 2.5),
                ("send", 2.5, 2.6),
            ],
        ),
        (Times(1.0, None, None, None, None, 1.3), [("tokenize", 1.0, 1.3)]),
        (Times(1.0, 1.1, None, None, None, 9.0), [("tokenize", 1.0, 1.1), ("queue", 1.1, 9.0)]),
        (Times(1.0, 1.1, None, 1.5, 2.5, 2.6), [("tokenize", 1.0, 1.1), ("decode", 1.5, 2.5), ("send", 2.5, 2.6)]),
    ],
    ids=["answered", "refused at once", "ended in the queue", "begun by another engine"],
)
def test_phases_follow_each_other(times: Times, expected: list[tuple[str, float, float]]) -> None:
    assert list(times.phases()) == expected


def recorded(asked: Request, outcome: Outcome, times: Times = NORMAL) -> list:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    RequestSpans(Tracing(provider), "llm").record(asked, times, outcome)
    return list(exporter.get_finished_spans())


def test_spans_of_a_request_meet_however_long_the_recording_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(10**18, 10**6)  # a millisecond passes before each look at the wall clock
    monkeypatch.setattr(time, "time_ns", lambda: next(now))
    *phases, whole = recorded(request(), Outcome("stop", ["stop"], 5, 3, 9))
    assert [span.name for span in phases] == list(PHASES)
    assert all(one.end_time == other.start_time for one, other in pairwise(phases))
    assert (phases[0].start_time, phases[-1].end_time) == (whole.start_time, whole.end_time)


def test_attributes_are_those_of_the_conventions() -> None:
    sampling = SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=2**64 - 1,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        stop=(SECRET,),
    )
    *_, whole = recorded(request(sampling=sampling, caller_id="mine"), Outcome("length", ["length"], 5, 3, 9))
    known = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    assert set(whole.attributes) <= known
    said = {name.removeprefix("gen_ai."): value for name, value in whole.attributes.items()}
    assert (
        said["request.seed"] == -1
        and said["request.max_tokens"] == 9
        and said["request.choice.count"] == 1
        and said["response.id"] == "mine"
    )
    assert (said["usage.input_tokens"], said["usage.cache_read.input_tokens"], said["usage.output_tokens"]) == (5, 3, 9)
    assert said["response.finish_reasons"] == ("length",) and said["response.time_to_first_chunk"] == pytest.approx(0.5)
    assert whole.name == "text_completion llm" and whole.status.is_unset and SECRET not in str(whole.to_json())


def test_a_chat_with_an_adapter_and_an_error_are_named() -> None:
    chat = Chat(messages="[]")
    *_, whole = recorded(
        request(text=None, chat=chat, sampling=SamplingParams(lora_name="\ud800x" * 99)),
        Outcome("overloaded", [], 0, 0, 0),
    )
    assert whole.name.startswith("chat llm:?x?x") and len(whole.name) < 80
    assert not whole.status.is_ok and whole.attributes["error.type"] == "overloaded"


def test_a_caller_who_is_not_sampled_is_not_recorded() -> None:
    assert recorded(request(trace={"traceparent": PARENT[:-1] + "0"}), Outcome("stop", ["stop"], 5, 3, 9)) == []


def test_a_request_brings_its_trace_as_parameters_or_forwarded_headers() -> None:
    import numpy as np

    prompt = {"text_input": np.array([b"x"], np.object_)}
    asked = read_request(prompt, f'{{"traceparent": "{PARENT}", "Tracestate": "a=1", "max_tokens": 3}}', 0.0)
    assert asked.trace == {"traceparent": PARENT, "tracestate": "a=1"} and asked.sampling.max_tokens == 3


def test_a_front_end_tells_a_collector_of_its_requests_and_of_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    ended = threading.Event()

    def send(deltas: tuple[Delta, ...], final: bool) -> None:
        if final:
            ended.set()

    with tempfile.TemporaryDirectory(dir="/tmp") as name, collector() as seen:
        monkeypatch.setattr(tempfile, "tempdir", name)
        front_end = FrontEnd(
            EngineConfig(model="fake", otlp_traces_endpoint=seen.url), uuid.uuid4().hex, 1, COMMAND, model_name="llm"
        )
        for text in (f"{SECRET} tokens=4 delay=0.02", f"{SECRET} error"):
            ended.clear()
            sampling = SamplingParams(max_tokens=8, stop=(SECRET * 2,))
            front_end.ask(
                request(text=text, sampling=sampling, arrival=time.monotonic(), trace={"traceparent": PARENT}),
                send,
                lambda: False,
            )
            assert ended.wait(20)
        front_end.close(5)
        spans = seen.wait(8)
    assert SECRET.encode() not in b"".join(seen.raw)
    by_name: dict[str, list[Seen]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    answered, failed = by_name["text_completion llm"]
    assert {span.trace_id for span in spans} == {TRACE_ID} and answered.parent_id == failed.parent_id == SPAN_ID
    assert failed.failed and not answered.failed and failed.attributes["error.type"] == "overloaded"
    inside = {name: next(span for span in by_name[name] if span.parent_id == answered.span_id) for name in PHASES}
    assert all(inside[one].end == inside[other].start for one, other in pairwise(PHASES))
    assert (
        inside["decode"].end - inside["decode"].start >= 0.05
        and answered.start == inside["tokenize"].start
        and inside["send"].end == answered.end
    )
    assert sorted(span.name for span in spans if span.parent_id == failed.span_id) == ["queue", "tokenize"]
