"""A chat template with a mistake is told of when the model is loaded, by file and line; a right one, whatever it uses,
is not.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from paged_backend.models.chat_template_syntax import template_mistakes
from paged_backend.models.tokenizer import export_tokenizer
from tests.log_records import lines_logged_by
from tests.small_tokenizers import byte_level

RIGHT = """{%- for message in messages -%}
{%- if loop.index > 5 %}{% break %}{% endif -%}
{% generation %}{{ message.content | trim | tojson(indent=2) }}{% endgeneration %}
{%- set n = namespace(a=strftime_now("%d")) %}{{ raise_exception("no") if message is not mapping }}
{%- endfor -%}
"""
MISTAKES = [
    pytest.param(
        "{{ bos_token }}\n{% for message in messages %}\n{{ message.content }\n{% endfor %}",
        "line 3: unexpected '}'",
        id="brace",
    ),
    pytest.param("a\n{% if messages %}\nb", "line 2: Unexpected end of template", id="no end"),
    pytest.param("a\n\n{{ messages | no_such }}", "line 3: no filter named 'no_such'", id="filter"),
    pytest.param("{% if messages is none_such %}{% endif %}", "line 1: no test named 'none_such'", id="test"),
    pytest.param("{{" + "(" * 100_000 + "}}", "nested too deeply", id="nested"),
]


def save(folder: Path, template: Any) -> None:
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template)
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))


@pytest.mark.parametrize(("template", "words"), MISTAKES)
def test_a_mistake_is_told_with_its_line(template: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(template)
    (line,) = template_mistakes({"default": template}, tmp_path)
    assert line.startswith("chat_template.jinja: ")
    assert words in line
    assert "\n" not in line and len(line) < 300


@pytest.mark.parametrize(
    ("template", "source"),
    [
        ("{{ a }", "chat_template.jinja: line 1: "),
        ([{"name": "default", "template": "{{ a }"}], "tokenizer_config.json, chat_template: line 1: "),
    ],
    ids=["a file", "in the config"],
)
def test_the_log_names_the_file_when_the_tokenizer_is_loaded(
    template: Any, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("paged"), "propagate", True)
    save(tmp_path, template)
    assert export_tokenizer(tmp_path, tmp_path / "exported.json") is not None
    (line,) = lines_logged_by("tokenizer", caplog)
    assert line.startswith(source)
    assert line.endswith("the chat template 'default' cannot be used, requests with messages are refused")


def test_what_transformers_renders_is_no_mistake(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": " a "}], chat_template=RIGHT, tokenize=False)
        == '"a"'
    )
    assert list(template_mistakes({"default": RIGHT, "tool_use": "{{ messages | length }}"}, tmp_path)) == []
