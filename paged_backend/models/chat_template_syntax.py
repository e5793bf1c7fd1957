"""Looks for mistakes in a checkpoint's chat templates when it is loaded: templates are only parsed, nothing in them
runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_FILE = "chat_template.jinja"
_MORE_FILES = "additional_chat_templates"
_CONFIG_FILES = ("tokenizer_config.json", "chat_template.json")  # with a key "chat_template"


class _Generation(Extension):
    """transformers' own block around what the assistant said."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_mistakes(templates: Mapping[str, str], folder: Path) -> Iterator[str]:
    """A sentence for each of `templates` (by name) that cannot be rendered at all, with the file in `folder` that it
    comes from, and the line.
    """
    environment = ImmutableSandboxedEnvironment(extensions=[_Generation, "jinja2.ext.loopcontrols"])
    for name, text in templates.items():
        try:
            mistake = _unknown_name(environment, environment.parse(text))
        except TemplateSyntaxError as error:
            mistake = f"line {error.lineno}: {error.message}"
        except RecursionError:
            mistake = "it is nested too deeply"
        if mistake is not None:
            yield (
                f"{_source(name, text, folder)}: {mistake}: the chat template '{name}' cannot be used, requests "
                "with messages are refused"
            )


def _unknown_name(environment: ImmutableSandboxedEnvironment, tree: nodes.Template) -> str | None:
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        kind, known = ("filter", environment.filters) if isinstance(node, nodes.Filter) else ("test", environment.tests)
        if node.name not in known:
            return f"line {node.lineno}: no {kind} named '{node.name}'"
    return None


def _source(name: str, text: str, folder: Path) -> str:
    """The file, relative to `folder`; for a template inside JSON its key, too: lines are those of the template then."""
    for path in (_FILE, f"{_MORE_FILES}/{name}.jinja"):
        if _content(folder / path) == text:
            return path
    for path in _CONFIG_FILES:
        content = _content(folder / path)
        if content is not None and text in _values(content):
            return f"{path}, chat_template"
    return "the chat template"


def _content(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _values(content: str) -> list[str]:
    """The templates in a JSON file: one, or a list of {name, template}."""
    try:
        value = json.loads(content)["chat_template"]
    except (ValueError, KeyError, TypeError):
        return []
    return [
        entry.get("template", "") if isinstance(entry, dict) else entry
        for entry in (value if isinstance(value, list) else [value])
    ]
