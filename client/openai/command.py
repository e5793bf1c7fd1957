"""`paged openai`."""

from __future__ import annotations

import contextlib
import ipaddress
import sys

import typer

from paged_backend.errors import EngineError
from paged_backend.extras import install_command
from paged_client.openai.options import (
    AnswerOptions,
    CallerLimits,
    DoorOptions,
    GatewayOptions,
    OperationOptions,
    PatienceOptions,
    ServersOptions,
)
from paged_client.option_groups import with_option_groups


@with_option_groups
def serve_openai(
    *,
    servers: ServersOptions,
    door: DoorOptions,
    patience: PatienceOptions,
    limits: CallerLimits,
    answers: AnswerOptions,
    operation: OperationOptions,
) -> None:
    """Speak OpenAI's API for a running server: completions, chats, responses, embeddings, models; and Anthropic's
    messages.

    Any client of OpenAI's works with the base URL that is printed; Anthropic's take it without /v1. vLLM's sampling
    keys (top_k, min_p, ignore_eos, guided_json …) are taken too. Tool calls and reasoning are read from the model's
    text, as its family writes them. /health says whether the model is ready.

    Needs the packages of the extra `openai`.
    """
    try:
        from paged_client.openai.starting import gateway_of
    except ImportError as error:
        raise _failure(f"{error.name} is missing: {install_command('openai')}") from None
    try:
        gateway = gateway_of(GatewayOptions(servers, door, patience, limits, answers, operation))
    except EngineError as error:
        raise _failure(str(error).replace("otlp_traces_endpoint:", "--otlp-traces-endpoint:")) from None
    except ImportError as error:
        raise _failure(f"{error.name} is missing: {install_command('cluster')}, or choose --routing least") from None
    except ValueError as error:
        raise _failure(str(error)) from None
    if not gateway.offer.api_key and not _is_loopback(door.host):
        say(f"{door.host} can be reached from elsewhere, and there is no API key: whoever reaches it may ask")
    try:
        listening = gateway.listen()
    except OSError as error:
        raise _failure(
            f"port {door.port} on {door.host} cannot be used: {error.strerror}; choose another with --port"
        ) from None
    with contextlib.closing(listening.listener):
        try:
            gateway.serve(listening)
        except KeyboardInterrupt:
            raise typer.Exit() from None
        except TimeoutError:
            names, urls = servers.model_name, ", ".join(gateway.options.urls)
            wanted = f"the model '{', '.join(names)}'" if names else "a model of paged's"
            raise _failure(
                f"{urls} is not there, or has not loaded {wanted} ({patience.wait_seconds:g} s waited)"
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
