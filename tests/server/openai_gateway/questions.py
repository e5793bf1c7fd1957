"""What the gateway is asked, and the server itself without it."""

from __future__ import annotations

from typing import Any

from paged_backend.server.launch import Server
from paged_client import PagedClient

PROMPT = "Once upon a time there was a clever baker called Mira. One day she"
HI = [{"role": "user", "content": "Where is the lamp?"}]


def direct(server: Server, prompt: Any = None, **options: Any) -> Any:
    with PagedClient(server.addresses.grpc_url) as paged:
        return paged.generate(prompt, **options)
