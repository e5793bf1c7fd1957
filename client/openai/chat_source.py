"""What other APIs need of the chat: whole, or as the chunks of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from fastapi import Request

from paged_client.openai.protocol import ChatBody

Chunks = AsyncGenerator[list[dict[str, Any]], None]
"""Of a stream: those of each piece together, so that they can be written together."""


class ChatSource(Protocol):
    async def whole(self, request: Request, body: ChatBody) -> dict[str, Any]:
        """A chat completion.

        Raises:
            RefusalError: there is none.
            CallerLeftError: nobody waits for it any more.
        """

    async def chunks(self, request: Request, body: ChatBody) -> tuple[Chunks, AsyncGenerator[Any, None]]:
        """Its chunks, once there is a first; and where they come from. The last may be an error. As `whole`
        otherwise.
        """

    async def num_prompt_tokens(self, body: ChatBody) -> int:
        """How many tokens the prompt has. As `whole` otherwise."""
