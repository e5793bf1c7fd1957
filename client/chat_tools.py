"""Functions of a Python file as tools of `paged chat`, and how the model's answers are read for calls and thoughts: as
the gateway reads them.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from paged_client.async_client import AsyncPagedClient
from paged_client.openai.answer_forms import ChatForm, FormOptions, chat_form, constrained
from paged_client.openai.errors import RefusalError
from paged_client.openai.formats.parser import Parser
from paged_client.openai.model_card import ModelCard
from paged_client.openai.protocol import ChatBody
from paged_client.openai.tools import tool_wishes
from paged_client.openai.translation import Asked

CHOICES = ("auto", "required")


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for."""

    function: Callable[..., Any]
    arguments: type[BaseModel]
    description: Mapping[str, Any]  # as OpenAI has it

    def run(self, arguments: str) -> str:
        """arguments: JSON. What the function returns, as JSON unless it is text; or what went wrong, for the model to
        read.
        """
        try:
            given = self.arguments.model_validate_json(arguments)
            found = self.function(**{name: getattr(given, name) for name in type(given).model_fields})
        except ValidationError as error:
            wrong = [f"{'.'.join(str(step) for step in one['loc'])}: {one['msg']}" for one in error.errors()]
            return f"error: {'; '.join(wrong)}"
        except Exception as error:  # the function is the caller's
            return f"error: {type(error).__name__}: {error}"
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)


def load_tools(path: Path) -> dict[str, Tool]:
    """The public functions of a file, by name. The file is run.

    Raises:
        ValueError: it cannot be run, has no function, or one lacks a type; the sentence names it.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"--tools {path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a file may raise
        raise ValueError(f"--tools {path}: {type(error).__name__}: {error}") from None
    found = {
        name: tool_of(function)
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == path.stem and not name.startswith("_")
    }
    if not found:
        raise ValueError(f"--tools {path}: it defines no public function")
    return found


def tool_of(function: Callable[..., Any]) -> Tool:
    """
    Raises:
        ValueError: an argument has no type.
    """
    name, doc = function.__name__, inspect.cleandoc(function.__doc__ or "")
    text, _, rest = doc.partition("\nArgs:")
    about = dict(re.findall(r"^\s+(\w+)(?: \([^)]*\))?: (.+)$", rest, re.MULTILINE))
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"--tools: {name}: its argument '{parameter.name}' has no type")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[parameter.name] = (hints[parameter.name], Field(default, description=about.get(parameter.name)))
    arguments = create_model(name, __config__=ConfigDict(extra="forbid"), **fields)
    described = {"name": name, "description": text.strip(), "parameters": arguments.model_json_schema()}
    return Tool(function, arguments, {"type": "function", "function": described})


@dataclass(frozen=True)
class Reading:
    """How answers are asked for and read."""

    form: ChatForm
    sampling: Mapping[str, Any]  # beside the caller's

    def parser(self) -> Parser | None:
        """None: an answer is plain text."""
        return None if self.form.answer.is_plain else self.form.answer.parser()


def readings(
    url: str, model: str, tools: Mapping[str, Tool], choice: str, sampling: Mapping[str, Any]
) -> tuple[Reading, Reading]:
    """(of a question, of what follows a tool's result): a call that must come must not come for ever.

    Raises:
        PagedError: the model cannot be asked.
        ValueError: the tools cannot be asked for.
    """

    async def ask() -> tuple[Reading, Reading]:
        async with AsyncPagedClient(url, model=model) as client:
            card = ModelCard(client)
            return await _reading(card, model, tools, choice, sampling), await _reading(
                card, model, tools, "auto", sampling
            )

    try:
        return asyncio.run(ask())
    except RefusalError as refusal:
        raise ValueError(str(refusal)) from None


async def _reading(
    card: ModelCard, model: str, tools: Mapping[str, Tool], choice: str, sampling: Mapping[str, Any]
) -> Reading:
    body = ChatBody(
        model=model,
        messages=[{"role": "user", "content": "Hello"}],
        tools=[dict(tool.description) for tool in tools.values()] or None,
        tool_choice=choice if tools else None,
        chat_template_kwargs=sampling.get("chat_template_kwargs"),
    )
    wishes = tool_wishes(body)
    form = await chat_form(card, FormOptions(), body, wishes)
    return Reading(form, constrained(Asked((None,), dict(sampling), 1), wishes, form).sampling)
