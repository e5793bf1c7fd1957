"""`paged openai`."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from typing import Annotated

import typer

from paged_backend.errors import EngineError
from paged_backend.extras import install_command
from paged_backend.tracing import open_tracing
from paged_client.client import DEFAULT_URL

ROUTERS = ("kv", "least", "turns")
_PROMPTS_AT_ONCE = 256  # of one request: more than a batch takes gain nothing
_HTTP_PROMPTS_AT_ONCE = 32  # each has a connection of its own


def serve_openai(
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
    ] = None,
    model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--model-name",
            metavar="NAME",
            help="What the server calls the model; repeatable. Without it: all paged models that it has loaded.",
        ),
    ] = None,
    metrics_url: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="The server's metrics, such as http://localhost:8002/metrics: the gateway's tell them under vLLM's "
            "names, too.",
        ),
    ] = "",
    routing: Annotated[
        str,
        typer.Option(
            metavar="|".join(ROUTERS),
            help="Of several servers: the one that has most of the prompt and least to do; the least busy; each in "
            "turn.",
        ),
    ] = "kv",
    tokenizer: Annotated[
        str, typer.Option(metavar="FOLDER_OR_ID", help="Of several servers' model, where it is not on this machine.")
    ] = "",
    served_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-name",
            metavar="NAME",
            help="What callers call the only model, instead of --model-name; repeatable.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; 0.0.0.0: every network, and then set an API key.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", "-p", metavar="PORT", min=0, max=65535, help="Where to listen; 0: a free one.")
    ] = 9000,
    api_key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            envvar="PAGED_API_KEY",
            show_default=False,
            help="Callers must send it; in the environment it is not in `ps`.",
        ),
    ] = "",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="How long an answer may take; then it is cancelled.")
    ] = 600.0,
    wait_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="How long to wait at start for the server to have loaded the model."
        ),
    ] = 600.0,
    max_body_bytes: Annotated[int, typer.Option(metavar="BYTES", min=1, help="Longest request body.")] = 16 * 2**20,
    max_bodies_bytes: Annotated[
        int,
        typer.Option(
            metavar="BYTES", min=1, help="Of all requests that are not over; the first 64 KiB of each are free."
        ),
    ] = 256 * 2**20,
    max_connections: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Connections from callers; 0: as many as the limit on open files allows."
        ),
    ] = 0,
    request_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0.1, help="How long a request's head, and then its body, may take to arrive."
        ),
    ] = 30.0,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin",
            metavar="ORIGIN",
            help="Web pages that may ask, such as https://example.org; localhost: this machine's; repeatable.",
        ),
    ] = None,
    tool_format: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the model writes tool calls: hermes, llama3_json …; auto: as its chat template says; none: not "
            "read.",
        ),
    ] = "auto",
    reasoning: Annotated[
        bool, typer.Option("--reasoning/--no-reasoning", help="Tell what the model thinks apart from its answer.")
    ] = True,
    scoring: Annotated[
        str,
        typer.Option(
            metavar="cosine|yes_no",
            help="How /v1/score and /v1/rerank score where a body does not say; yes_no: for Qwen3-Reranker.",
        ),
    ] = "cosine",
    max_stored_responses: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="Answers of /v1/responses that later ones may go on from, in memory; 0: none."
        ),
    ] = 1000,
    otlp_traces_endpoint: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="An OpenTelemetry collector that is told of every request as a span, such as http://localhost:4318, "
            "never of text.",
        ),
    ] = "",
    hide_adapters: Annotated[
        bool, typer.Option("--hide-adapters", help="Leave adapters out of /v1/models; whoever knows a name may use it.")
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse keys that are unknown here, instead of ignoring them with a warning."),
    ] = False,
    drain_seconds: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="How long a stop waits for answers in flight.")
    ] = 30,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="A line for every request: address, path and status, never text.")
    ] = False,
) -> None:
    """Speak OpenAI's API for a running server: completions, chat completions, models.

    Any client of OpenAI's works with the base URL that is printed. vLLM's sampling keys (top_k, min_p, ignore_eos,
    guided_json …) are taken too. Tool calls and reasoning are read from the model's text, as its family writes them.
    /health says whether the model is ready.

    Needs the packages of the extra `openai`.
    """
    try:
        from paged_client.openai.answer_forms import FormOptions
        from paged_client.openai.auth import usable_key
        from paged_client.openai.connections import ConnectionLimits, available_descriptors
        from paged_client.openai.gateway import Offer
        from paged_client.openai.limits import BodyLimits
        from paged_client.openai.ranking_api import checked_scoring
        from paged_client.openai.serving import Listening, listen, run, serve
        from paged_client.openai.upstream import Upstream
    except ImportError as error:
        raise _failure(f"{error.name} is missing: {install_command('openai')}") from None
    urls = url or [DEFAULT_URL]
    over_http = any(one.startswith("http") for one in urls)
    descriptors = available_descriptors()
    upstream = descriptors // 2 if over_http else 0  # over gRPC one connection carries every request
    forms = FormOptions(tool_format, reasoning)
    try:
        forms.check()
        offer = Offer(
            api_key=usable_key(api_key),
            bodies=BodyLimits(max_body_bytes, max_bodies_bytes, request_seconds),
            origins=tuple(allow_origin or ()),
            prompts_at_once=_HTTP_PROMPTS_AT_ONCE if over_http else _PROMPTS_AT_ONCE,
            strict=strict,
            server_metrics=metrics_url,
            list_adapters=not hide_adapters,
            forms=forms,
            max_stored_responses=max_stored_responses,
            scoring=checked_scoring(scoring),
        )
        models = Upstream(urls, routing, timeout, tokenizer, upstream).models(model_name or (), served_name or ())
        tracing = open_tracing(otlp_traces_endpoint, "paged-gateway", {})
    except EngineError as error:
        raise _failure(str(error).replace("otlp_traces_endpoint:", "--otlp-traces-endpoint:")) from None
    except ImportError as error:
        raise _failure(f"{error.name} is missing: {install_command('cluster')}, or choose --routing least") from None
    except ValueError as error:
        raise _failure(str(error)) from None
    if not offer.api_key and not _is_loopback(host):
        say(f"{host} can be reached from elsewhere, and there is no API key: whoever reaches it may ask")
    connections = ConnectionLimits(
        min(max_connections or descriptors - upstream, descriptors - upstream), request_seconds
    )
    try:
        listener = listen(host, port)
    except OSError as error:
        raise _failure(f"port {port} on {host} cannot be used: {error.strerror}; choose another with --port") from None
    with contextlib.closing(listener):
        listening = Listening(host, listener, drain_seconds, access_log, wait_seconds)
        try:
            run(serve(models, offer, connections, listening, ", ".join(urls), tracing))
        except KeyboardInterrupt:
            raise typer.Exit() from None
        except TimeoutError:
            wanted = f"the model '{', '.join(model_name)}'" if model_name else "a model of paged's"
            raise _failure(
                f"{', '.join(urls)} is not there, or has not loaded {wanted} ({wait_seconds:g} s waited)"
            ) from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def say(sentence: str) -> None:
    print(f"paged: {sentence}", file=sys.stderr, flush=True)


def _failure(sentence: str) -> typer.Exit:
    say(f"error: {sentence}")
    return typer.Exit(1)
