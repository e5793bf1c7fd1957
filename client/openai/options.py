"""The options of `paged openai`, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from paged_client.client import DEFAULT_URL

ROUTERS = ("kv", "least", "turns")


@dataclass(frozen=True)
class ServersOptions:
    """The servers behind the gateway, and what they and callers call their models."""

    url: Annotated[
        list[str] | None,
        typer.Option(
            "--url",
            "-u",
            metavar="URL",
            help="HOST:PORT of the server's gRPC service, or http://HOST:PORT of its HTTP service. Given more than "
            "once: servers that answer as one. "
            "Also dns://HOST:PORT, for every address that a name has, and file:///PATH, for a URL a line; both "
            "are read again while the gateway runs.",
            show_default=DEFAULT_URL,
        ),
    ] = None
    model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--model-name",
            metavar="NAME",
            help="What the server calls the model; repeatable. Without it: all paged models that it has loaded.",
        ),
    ] = None
    metrics_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="The server's metrics, such as http://localhost:8002/metrics: the gateway's tell them under vLLM's "
            "names, too.",
        ),
    ] = ""
    routing: Annotated[
        str,
        typer.Option(
            metavar="|".join(ROUTERS),
            help="Of several servers: the one that has most of the prompt and least to do; the least busy; each in "
            "turn.",
        ),
    ] = "kv"
    tokenizer: Annotated[
        str, typer.Option(metavar="FOLDER_OR_ID", help="Of several servers' model, where it is not on this machine.")
    ] = ""
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="What callers call the only model, instead of --model-name; repeatable.",
        ),
    ] = None


@dataclass(frozen=True)
class DoorOptions:
    """Where callers reach the gateway, and the key they need."""

    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: every network, and then set an API key.")
    ] = "127.0.0.1"
    port: Annotated[
        int, typer.Option("--port", "-p", metavar="PORT", min=0, max=65535, help="Where to listen; 0: a free one.")
    ] = 9000
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            envvar="PAGED_API_KEY",
            show_default=False,
            help="Callers must send it; in the environment it is not in `ps`.",
        ),
    ] = ""


@dataclass(frozen=True)
class PatienceOptions:
    """How long an answer, and the server at start, are waited for."""

    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="How long an answer may take; then it is cancelled.")
    ] = 600.0
    wait_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="How long to wait at start for the server to have loaded the model."
        ),
    ] = 600.0


@dataclass(frozen=True)
class CallerLimits:
    """What one caller, and all together, may take of the gateway."""

    max_body_bytes: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Longest request body.")] = 16 * 2**20
    max_bodies_bytes: Annotated[
        int,
        typer.Option(
            metavar="BYTES", min=1, help="Of all requests that are not over; the first 64 KiB of each are free."
        ),
    ] = 256 * 2**20
    max_connections: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Connections from callers; 0: as many as the limit on open files allows."
        ),
    ] = 0
    request_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, help="How long a request's head, and then its body, may take to arrive."
        ),
    ] = 30.0
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Web pages that may ask, such as https://example.org; localhost: this machine's; repeatable.",
        ),
    ] = None


@dataclass(frozen=True)
class AnswerOptions:
    """How a model's text is read and its answers are scored and stored."""

    tool_format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes tool calls: hermes, llama3_json …; auto: as its chat template says; none: not "
            "read.",
        ),
    ] = "auto"
    reasoning: Annotated[
        bool, typer.Option("--reasoning/--no-reasoning", help="Tell what the model thinks apart from its answer.")
    ] = True
    scoring: Annotated[
        str,
        typer.Option(
            metavar="cosine|yes_no",
            help="How /v1/score and /v1/rerank score where a body does not say; yes_no: for Qwen3-Reranker.",
        ),
    ] = "cosine"
    max_stored_responses: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Answers of /v1/responses that later ones may go on from, in memory; 0: none."
        ),
    ] = 1000


@dataclass(frozen=True)
class OperationOptions:
    """What is told to whom, and how the gateway stops."""

    otlp_traces_endpoint: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="An OpenTelemetry collector that is told of every request as a span, such as http://localhost:4318, "
            "never of text.",
        ),
    ] = ""
    hide_adapters: Annotated[
        bool, typer.Option("--hide-adapters", help="Leave adapters out of /v1/models; whoever knows a name may use it.")
    ] = False
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse keys that are unknown here, instead of ignoring them with a warning."),
    ] = False
    drain_seconds: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="How long a stop waits for answers in flight.")
    ] = 30
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line for every request: address, path and status, never text.")
    ] = False


@dataclass(frozen=True)
class GatewayOptions:
    """Everything that `paged openai` was told."""

    servers: ServersOptions
    door: DoorOptions
    patience: PatienceOptions
    limits: CallerLimits
    answers: AnswerOptions
    operation: OperationOptions

    @property
    def urls(self) -> list[str]:
        return self.servers.url or [DEFAULT_URL]

    @property
    def over_http(self) -> bool:
        return any(url.startswith("http") for url in self.urls)
