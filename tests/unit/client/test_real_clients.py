"""OpenAI's and Anthropic's own client libraries, unchanged, over HTTP to the gateway; the model behind it is a
script.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import openai
import uvicorn
from pydantic import BaseModel

from paged_client import AsyncPagedClient
from paged_client.openai.gateway import Offer, make_app
from tests.unit.client.test_openai_tools import CALL, HERMES, THINKS, THOUGHT, Model, tool

MODEL, KEY = "m", "secret"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Weather(BaseModel):
    city: str


@contextmanager
def serving(model: Model) -> Iterator[str]:
    """The gateway's address."""
    client = AsyncPagedClient("nowhere:1", retries=0)
    client._transport = model
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(make_app(client, Offer((MODEL,), KEY)), log_level="error", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


def test_openais_client_chats_with_tools_and_parses() -> None:
    with (
        serving(Model(HERMES, *CALL)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        asked = {"model": MODEL, "messages": [{"role": "user", "content": "Weather?"}], "tools": [tool()]}
        made = client.chat.completions.create(**asked).choices[0].message.tool_calls[0]
        assert json.loads(made.function.arguments) == {"city": "Paris"}
        with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion().choices[0]
        assert "tool_calls.function.arguments.delta" in kinds and final.finish_reason == "tool_calls"
        assert final.message.tool_calls[0].function.arguments == made.function.arguments
        parsed = client.chat.completions.parse(
            **{**asked, "tools": [openai.pydantic_function_tool(Weather, name="get_weather")]}
        )
        assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Paris")


def test_openais_client_parses_a_form() -> None:
    with (
        serving(Model(HERMES, '{"city":', ' "Oslo"}')) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        said = client.chat.completions.parse(
            model=MODEL, messages=[{"role": "user", "content": "x"}], response_format=Weather
        )
        assert said.choices[0].message.parsed == Weather(city="Oslo")
        assert client.responses.parse(model=MODEL, input="x", text_format=Weather).output_parsed == Weather(city="Oslo")


def test_openais_client_uses_responses() -> None:
    function = {"type": "function", "name": "get_weather", "parameters": SCHEMA}
    with (
        serving(Model(HERMES, *CALL)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        text, made = client.responses.create(model=MODEL, input="Weather?", tools=[function]).output
        assert (text.content[0].text, made.name, json.loads(made.arguments)) == (
            "Let me look.",
            "get_weather",
            {"city": "Paris"},
        )
        with client.responses.stream(model=MODEL, input="Weather?", tools=[function]) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.function_call_arguments.delta" in kinds
        assert [item.type for item in final.output] == ["message", "function_call"]
        result = [{"type": "function_call_output", "call_id": final.output[1].call_id, "output": "sun"}]
        assert client.responses.create(model=MODEL, input=result, previous_response_id=final.id).status == "completed"


def test_openais_client_reads_thoughts() -> None:
    with (
        serving(Model(THINKS, *THOUGHT, end="<think>")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client,
    ):
        thought, answer = client.responses.create(model=MODEL, input="x", reasoning={"effort": "low"}).output
        assert (thought.type, thought.content[0].text, answer.content[0].text) == ("reasoning", "Hmm.", "Yes.")
        chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
        assert chat.choices[0].message.reasoning_content == "Hmm."


def test_anthropics_client_uses_tools_and_streams() -> None:
    anthropic = pytest.importorskip("anthropic")
    asked = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Weather?"}]}
    asked["tools"] = [{"name": "get_weather", "input_schema": SCHEMA}]
    with (
        serving(Model(HERMES, *CALL)) as url,
        anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client,
    ):
        message = client.messages.create(**asked)
        text, use = message.content
        assert (text.text, use.name, use.input, message.stop_reason) == (
            "Let me look.",
            "get_weather",
            {"city": "Paris"},
            "tool_use",
        )
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == "Let me look."
            final = stream.get_final_message()
        assert (final.content[1].input, final.stop_reason, final.usage.output_tokens) == (
            {"city": "Paris"},
            "tool_use",
            len(CALL),
        )
        assert client.messages.count_tokens(model=MODEL, messages=asked["messages"]).input_tokens == 2
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**{**asked, "model": "other"})
    with (
        serving(Model(HERMES, "x")) as url,
        anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as stranger,
    ):
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.create(**asked)
