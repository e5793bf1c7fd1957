"""The options of `paged openai` as a gateway that is ready to serve."""

from __future__ import annotations

from dataclasses import dataclass

from paged_backend.tracing import Tracing, open_tracing
from paged_client.openai.answer_forms import FormOptions
from paged_client.openai.auth import usable_key
from paged_client.openai.connections import ConnectionLimits, available_descriptors
from paged_client.openai.gateway import Offer
from paged_client.openai.limits import BodyLimits
from paged_client.openai.models import Models
from paged_client.openai.options import GatewayOptions
from paged_client.openai.ranking_api import checked_scoring
from paged_client.openai.serving import Listening, listen, run, serve
from paged_client.openai.upstream import Upstream

_PROMPTS_AT_ONCE = 256  # of one request: more than a batch takes gain nothing
_HTTP_PROMPTS_AT_ONCE = 32  # each has a connection of its own


@dataclass(frozen=True)
class Gateway:
    """A gateway whose options have been checked; it listens nowhere yet."""

    options: GatewayOptions
    models: Models
    offer: Offer
    connections: ConnectionLimits
    tracing: Tracing | None

    def listen(self) -> Listening:
        """Takes the address.

        Raises:
            OSError: it cannot be used.
        """
        door, operation = self.options.door, self.options.operation
        return Listening(
            door.host,
            listen(door.host, door.port),
            operation.drain_seconds,
            operation.access_log,
            self.options.patience.wait_seconds,
        )

    def serve(self, listening: Listening) -> None:
        """Until SIGINT or SIGTERM.

        Raises:
            KeyboardInterrupt: it was stopped before it was ready.
            TimeoutError: the servers are not there, or have not loaded the model.
        """
        run(serve(self.models, self.offer, self.connections, listening, ", ".join(self.options.urls), self.tracing))


def gateway_of(options: GatewayOptions) -> Gateway:
    """Checks the options and puts the gateway together.

    Raises:
        EngineError: the endpoint of spans is wrong.
        ImportError: a package of the extra `cluster` is missing.
        ValueError: another option is wrong.
    """
    servers, limits, operation = options.servers, options.limits, options.operation
    descriptors = available_descriptors()
    # over gRPC one connection carries every request
    upstream = descriptors // 2 if options.over_http else 0
    offer = _offer(options)
    models = Upstream(options.urls, servers.routing, options.patience.timeout, servers.tokenizer, upstream).models(
        servers.model_name or (), servers.served_name or ()
    )
    connections = ConnectionLimits(
        min(limits.max_connections or descriptors - upstream, descriptors - upstream), limits.request_seconds
    )
    tracing = open_tracing(operation.otlp_traces_endpoint, "paged-gateway", {})
    return Gateway(options, models, offer, connections, tracing)


def _offer(options: GatewayOptions) -> Offer:
    limits, answers = options.limits, options.answers
    forms = FormOptions(answers.tool_format, answers.reasoning)
    forms.check()
    return Offer(
        api_key=usable_key(options.door.api_key),
        bodies=BodyLimits(limits.max_body_bytes, limits.max_bodies_bytes, limits.request_seconds),
        origins=tuple(limits.allow_origin or ()),
        prompts_at_once=_HTTP_PROMPTS_AT_ONCE if options.over_http else _PROMPTS_AT_ONCE,
        strict=options.operation.strict,
        server_metrics=options.servers.metrics_url,
        list_adapters=not options.operation.hide_adapters,
        forms=forms,
        max_stored_responses=answers.max_stored_responses,
        scoring=checked_scoring(answers.scoring),
    )
