"""Libraries that agents are made with, unchanged, against the embedded model behind a real server and gateway. One
server for all.

Each is skipped where it is not installed: they pull in much, and some of them each other's older versions, so no extra
names them. `required` makes the model call a tool through the grammar, whatever it would do by itself, and what is
tested is that the library's way there and back works.

    pip install langchain-openai openai-agents instructor litellm llama-index-llms-openai-like 'lm-eval[api]' 'numpy<2'
    pytest -m long tests/clients
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("fastapi")
pytest.importorskip("openai")
pytest.importorskip("xgrammar")

from pydantic import BaseModel

from paged_backend.config import demo_model_folder
from paged_backend.server.launch import Server, ServerSettings
from paged_client import PagedClient
from tests.server.gateway_process import KEY, Gateway, gateway_to
from tests.server.served import served

pytestmark = [pytest.mark.server, pytest.mark.long, pytest.mark.timeout(180)]

MODEL = "paged_llm"
ASKED = "Where is the lamp?"
Place = Literal["kitchen", "garden", "cellar"]


class Lookup(BaseModel):
    """Looks something up in the house."""

    thing: Literal["lamp", "lantern", "fox"]
    room: Place


SCHEMA = {
    "type": "function",
    "function": {"name": "Lookup", "description": "Looks something up.", "parameters": Lookup.model_json_schema()},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = {"num_pages": 400, "dtype": "float32", "default_max_tokens": 64}
    with served(ServerSettings(instances=1, options=options)) as running:
        yield running


@pytest.fixture(scope="module")
def gateway(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway_to(server.addresses.grpc_url, tmp_path_factory.mktemp("gateway")) as running:
        yield running


def check_call(name: str, arguments: Any) -> None:
    assert name == "Lookup"
    Lookup.model_validate(arguments if isinstance(arguments, dict) else json.loads(arguments))


def test_langchain_binds_tools_and_reads_forms(gateway: Gateway) -> None:
    langchain = pytest.importorskip("langchain_openai")
    model = langchain.ChatOpenAI(
        model=MODEL, base_url=gateway.url, api_key=KEY, temperature=0, max_retries=0, max_tokens=100
    )
    assert isinstance(model.invoke(ASKED).content, str)
    (call,) = model.bind_tools([Lookup], tool_choice="required", parallel_tool_calls=False).invoke(ASKED).tool_calls
    check_call(call["name"], call["args"])
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Lookup, method=method).invoke(ASKED), Lookup)
    streamed = None
    for chunk in model.bind_tools([Lookup], tool_choice="Lookup").stream(ASKED):
        streamed = chunk if streamed is None else streamed + chunk
    check_call(streamed.tool_calls[0]["name"], streamed.tool_calls[0]["args"])


@pytest.mark.parametrize("api", ["chat_completions", "responses"])
def test_openais_agents_run_a_function_and_stop_with_its_result(gateway: Gateway, api: str) -> None:
    agents = pytest.importorskip("agents")
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)
    called = []

    @agents.function_tool
    def look_up(thing: Literal["lamp", "fox"], room: Place) -> str:
        """Looks something up in the house.

        Args:
            thing: what is looked for.
            room: where.
        """
        called.append((thing, room))
        return f"The {thing} is in the {room}."

    async def run() -> str:
        async with AsyncOpenAI(base_url=gateway.url, api_key=KEY, max_retries=0) as client:
            kind = agents.OpenAIChatCompletionsModel if api == "chat_completions" else agents.OpenAIResponsesModel
            settings = agents.ModelSettings(tool_choice="required", temperature=0, max_tokens=100)
            agent = agents.Agent(
                name="Finder",
                tools=[look_up],
                model=kind(MODEL, client),
                model_settings=settings,
                tool_use_behavior="stop_on_first_tool",
            )
            return str((await agents.Runner.run(agent, ASKED, max_turns=2)).final_output)

    said = asyncio.run(run())
    assert said in {f"The {thing} is in the {room}." for thing, room in called}


def test_instructor_fills_models(gateway: Gateway) -> None:
    instructor = pytest.importorskip("instructor")
    with gateway.client() as client:
        for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
            made = instructor.from_openai(client, mode=mode).chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": ASKED}],
                response_model=Lookup,
                max_retries=0,
                max_tokens=100,
                temperature=0,
            )
            assert isinstance(made, Lookup)


def test_litellm_completes_streams_calls_and_embeds(gateway: Gateway) -> None:
    litellm = pytest.importorskip("litellm")
    asked = {
        "model": f"openai/{MODEL}",
        "api_base": gateway.url,
        "api_key": KEY,
        "messages": [{"role": "user", "content": ASKED}],
        "max_tokens": 100,
    }
    assert litellm.completion(**asked, temperature=0).choices[0].message.content
    assert "".join(
        chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, temperature=0, stream=True)
    )
    (call,) = (
        litellm.completion(**asked, tools=[SCHEMA], tool_choice="required", parallel_tool_calls=False)
        .choices[0]
        .message.tool_calls
    )
    check_call(call.function.name, call.function.arguments)
    made = litellm.embedding(model=f"openai/{MODEL}", api_base=gateway.url, api_key=KEY, input=[ASKED, "A fox."])
    assert len(made.data) == 2 and len(made.data[0]["embedding"]) == len(made.data[1]["embedding"]) > 100


def test_llamaindex_chats_and_calls(gateway: Gateway) -> None:
    pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(
        model=MODEL,
        api_base=gateway.url,
        api_key=KEY,
        is_chat_model=True,
        is_function_calling_model=True,
        temperature=0,
        max_tokens=100,
        max_retries=0,
    )
    assert llm.chat([ChatMessage(role="user", content=ASKED)]).message.content
    assert "".join(piece.delta or "" for piece in llm.stream_chat([ChatMessage(role="user", content=ASKED)]))

    def look_up(thing: str, room: str) -> str:
        """Looks something up in the house."""
        return f"The {thing} is in the {room}."

    answer = llm.chat_with_tools([FunctionTool.from_defaults(look_up)], user_msg=ASKED, tool_choice="required")
    (call, *_) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "look_up" and set(call.tool_kwargs) == {"thing", "room"}


def test_the_ai_sdk_generates_and_calls(gateway: Gateway, tmp_path: Path) -> None:
    """Vercel's, for JavaScript."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm")
    install = [
        "npm",
        "install",
        "--silent",
        "--no-audit",
        "--no-fund",
        "--prefix",
        str(tmp_path),
        "ai",
        "@ai-sdk/openai-compatible",
        "zod",
    ]
    if subprocess.run(install, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("npm cannot install the packages")
    (tmp_path / "ask.mjs").write_text(_AI_SDK)
    done = subprocess.run(
        ["node", "ask.mjs", gateway.url, KEY, MODEL],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["text"] and said["streamed"]
    check_call(said["call"]["toolName"], said["call"]["input"])
    Lookup.model_validate(said["object"])


_AI_SDK = """
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText, tool } from "ai";
import { z } from "zod";
const [url, apiKey, name] = process.argv.slice(2);
const model = createOpenAICompatible({ name: "paged", baseURL: url, apiKey, supportsStructuredOutputs: true })(name);
const schema = z.object({ thing: z.enum(["lamp", "lantern", "fox"]), room: z.enum(["kitchen", "garden", "cellar"]) });
const asked = { model, prompt: "Where is the lamp?", temperature: 0, maxOutputTokens: 100, maxRetries: 0 };
const { text } = await generateText(asked);
let streamed = "";
for await (const piece of streamText(asked).textStream) streamed += piece;
const tools = { Lookup: tool({ description: "Looks something up.", inputSchema: schema }) };
const { toolCalls } = await generateText({ ...asked, tools, toolChoice: "required" });
const { object } = await generateObject({ ...asked, schema });
console.log(JSON.stringify({ text, streamed, call: toolCalls[0], object }));
"""


def test_the_evaluation_harness_scores_texts_and_generates(server: Server, gateway: Gateway) -> None:
    """EleutherAI's, by `local-completions`: what it takes from echo, logprobs and max_tokens is what the server says of
    the same tokens.
    """
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from tokenizers import Tokenizer

    folder = str(demo_model_folder())
    harness = LocalCompletionsAPI(
        model=MODEL,
        base_url=f"{gateway.url}/completions",
        tokenizer=folder,
        tokenizer_backend="huggingface",
        max_length=512,
        num_concurrent=1,
        header={"Authorization": f"Bearer {KEY}"},
    )
    pairs = [("Once there was a", " lamp"), ("The fox's name was", " Pepper. It was careful.")]
    found = harness.loglikelihood([Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)])
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    with PagedClient(server.addresses.grpc_url) as paged:
        for (context, ending), (score, is_greedy) in zip(pairs, found, strict=True):
            # as the harness has them
            whole, known = (
                tokenizer.encode(text, add_special_tokens=False).ids for text in (context + ending, context)
            )
            begun = len(known)
            entries = paged.generate(whole, max_tokens=1, prompt_logprobs=0).prompt_logprobs[begun:]
            assert score == pytest.approx(sum(entry[0].logprob for entry in entries if entry is not None), abs=1e-3)
            assert is_greedy == all(entry is not None and entry[0].rank == 1 for entry in entries)
    asked = Instance(
        "generate_until", {}, ("Once there was a", {"until": ["\n"], "max_gen_toks": 10, "temperature": 0}), 0
    )
    assert harness.generate_until([asked])[0]
