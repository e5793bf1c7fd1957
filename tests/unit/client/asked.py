"""Requests of OpenAI's API, read."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("fastapi")

from paged_client.openai.protocol import ChatBody, CompletionBody
from paged_client.openai.translation import Asked, asked_of_chat, asked_of_completion

ASK = [{"role": "user", "content": "Hi"}]


def completion(**keys: Any) -> Asked:
    return asked_of_completion(CompletionBody.model_validate({"model": "m", "prompt": "x", **keys}))


def chat(**keys: Any) -> Asked:
    return asked_of_chat(ChatBody.model_validate({"model": "m", "messages": ASK, **keys}))
