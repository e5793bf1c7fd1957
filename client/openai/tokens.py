"""`/tokenize` and `/detokenize`, as vLLM has them: the model's own front end answers, no token is generated."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from paged_client.errors import PagedError
from paged_client.openai.errors import RefusalError, refusal_of
from paged_client.openai.model_card import ModelCard
from paged_client.openai.protocol import DetokenizeBody, TokenizeBody
from paged_client.openai.translation import Asked, message_of, template_tools
from paged_client.question import Prompt

_AT_ONCE = 32
_PARAMS = {"text_input": "prompt", "input_ids": "tokens"}


async def tokenize(card: ModelCard, body: TokenizeBody) -> dict[str, Any]:
    """
    Raises:
        RefusalError: neither a prompt nor messages, or both; or the server refuses them.
    """
    if (body.prompt is None) == (body.messages is None):
        raise RefusalError("prompt: send either prompt or messages", param="prompt")
    sampling = {"add_special_tokens": body.add_special_tokens, "chat_template_kwargs": body.chat_template_kwargs}
    try:
        if body.messages is None:
            token_ids = await card.client.tokenize(body.prompt, sampling=sampling)
        else:
            messages = [message_of(position, message, []) for position, message in enumerate(body.messages)]
            token_ids = await card.client.tokenize(
                messages=messages,
                tools=template_tools(body.tools),
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                sampling=sampling,
            )
        description = await card.description()
    except PagedError as error:
        raise refusal_of(error, _PARAMS) from None
    tokens = list(token_ids)
    return {"count": len(tokens), "max_model_len": description.max_model_len, "tokens": tokens, "token_strs": None}


async def with_echo(card: ModelCard, asked: Asked, with_logprobs: bool) -> Asked:
    """With what the answers to echo begin with: each prompt's text, and its first token's.

    Raises:
        RefusalError: the server cannot read a prompt.
    """
    places = asyncio.Semaphore(_AT_ONCE)

    async def one(prompt: Prompt | None) -> tuple[str, str]:
        assert prompt is not None
        async with places:
            text = prompt if isinstance(prompt, str) else await card.client.detokenize(prompt)
            if not with_logprobs:
                return text, ""
            token_ids = (
                await card.client.tokenize(prompt, sampling=_of_prompt(asked)) if isinstance(prompt, str) else prompt
            )
            return text, await card.client.detokenize(token_ids[:1])

    try:
        found = await asyncio.gather(*map(one, asked.prompts))
    except PagedError as error:
        raise refusal_of(error, asked.params) from None
    return replace(asked, echoed=tuple(text for text, _ in found), first_tokens=tuple(first for _, first in found))


def _of_prompt(asked: Asked) -> dict[str, Any]:
    """The sampling keys that change the prompt's tokens."""
    return {name: asked.sampling.get(name) for name in ("add_special_tokens", "truncate_prompt_tokens")}


async def detokenize(card: ModelCard, body: DetokenizeBody) -> dict[str, Any]:
    """
    Raises:
        RefusalError: the server refuses them.
    """
    try:
        return {"prompt": await card.client.detokenize(body.tokens)}
    except PagedError as error:
        raise refusal_of(error, _PARAMS) from None
