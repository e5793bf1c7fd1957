"""The process that renders chat templates: what a checkpoint's template may do to it, and how little it costs."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from paged_backend.config import EngineConfig
from paged_backend.errors import ErrorKind, RequestError
from paged_backend.frontend import template_renderer
from paged_backend.frontend.prompt import PromptReader
from paged_backend.frontend.template_process import Rendering, render_here
from paged_backend.frontend.template_renderer import TemplateRenderer
from paged_backend.messages import ExportedTemplate, Ready
from paged_backend.request import Chat
from tests.small_tokenizers import byte_level

ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% "
    "endfor %}"
)
LARGE = {
    "a product": "{{ 'x' * 4000000000 }}",
    "a width": "{{ '%4000000000d' | format(1) }}",
    "doubling": "{% set all = namespace(text='x' * 1000) %}{% for a in range(40) %}{% "
    "set all.text = all.text ~ all.text %}{% endfor %}",
}
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    renderer.close()


def rendering(template: str, content: str = "hi", max_bytes: int = 10**6) -> Rendering:
    messages: list[Any] = [{"role": "user", "content": content}]
    return Rendering(
        template=template,
        messages=messages,
        tools=None,
        add_generation_prompt=True,
        continue_final_message=False,
        variables={},
        max_bytes=max_bytes,
    )


def test_the_text_is_what_transformers_makes_here(renderer: TemplateRenderer) -> None:
    asked = rendering(CHATML, "wörld 😀 </s>" * 20_000)
    assert renderer.render(asked) == render_here(asked)
    assert renderer.render(rendering("{{ raise_exception('alternate!') }}")).error == "alternate!"


def test_an_endless_template_is_ended_and_the_next_one_is_rendered(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer.warm()
    monkeypatch.setattr(template_renderer, "RENDER_SECONDS", 1.0)
    begun = time.monotonic()
    assert renderer.render(rendering(ENDLESS)).error == "it takes more than 1 s"
    assert time.monotonic() - begun < 5
    monkeypatch.undo()
    assert renderer.render(rendering(CHATML)).text == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("template", LARGE.values(), ids=LARGE.keys())
def test_a_template_that_wants_too_much_memory_is_refused(renderer: TemplateRenderer, template: str) -> None:
    assert renderer.render(rendering(template)).error == "it needs more than 1024 MiB of memory"
    assert renderer.render(rendering(CHATML)).text


def test_a_text_that_is_too_long_is_refused_where_it_was_made(renderer: TemplateRenderer) -> None:
    assert (
        renderer.render(rendering("{{ 'é' * 501 }}", max_bytes=1000)).error
        == "it makes a text of 1002 bytes of them; the longest allowed is 1000"
    )
    assert renderer.render(rendering("{{ 'é' * 500 }}", max_bytes=1000)).text == "é" * 500


def test_a_process_that_was_killed_is_replaced_and_torch_is_not_imported(renderer: TemplateRenderer) -> None:
    renderer.warm()
    assert renderer._process is not None
    maps = Path(f"/proc/{renderer._process.pid}/maps").read_text()
    assert "libtorch" not in maps
    os.kill(renderer._process.pid, 9)
    renderer._process.wait()
    assert renderer.render(rendering(CHATML)).text


def test_a_process_killed_while_it_renders_is_replaced_and_asked_again(
    renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    renderer.warm()
    killed: list[int] = []
    send = template_renderer.send

    def kill_first(stream: Any, message: Any) -> None:
        assert renderer._process is not None
        if len(killed) < deaths:
            killed.append(renderer._process.pid)
            os.kill(renderer._process.pid, 9)
        send(stream, message)

    monkeypatch.setattr(template_renderer, "send", kill_first)
    for deaths in (1, 2):
        killed.clear()
        answer = renderer.render(rendering(CHATML))
        assert (bool(answer.text), answer.error) == (
            (True, "") if deaths == 1 else (False, "the process that rendered it died")
        )
        assert len(set(killed)) == deaths


def test_a_stop_does_not_wait_for_a_template() -> None:
    renderer = TemplateRenderer()
    renderer.warm()
    errors: list[RequestError] = []

    def ask() -> None:
        try:
            renderer.render(rendering(ENDLESS))
        except RequestError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    begun = time.monotonic()
    renderer.close()
    thread.join()
    assert time.monotonic() - begun < 3
    assert [(str(error), error.kind) for error in errors] == [("the model is being unloaded", ErrorKind.OVERLOADED)]
    with pytest.raises(RequestError, match="unloaded"):
        renderer.render(rendering(CHATML))


def test_what_it_is_told_is_json_of_any_size_of_number(renderer: TemplateRenderer) -> None:
    asked = rendering("{{ messages[0].n }}")
    asked.messages[0]["n"] = json.loads("123456789012345678901234567890")
    assert renderer.render(asked).text == "123456789012345678901234567890"


def test_texts_do_not_wait_for_a_template_and_a_close_ends_it(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.json").write_bytes(msgspec.json.encode(ExportedTemplate({"default": ENDLESS}, {})))
    reader = PromptReader(EngineConfig.parse({}), Ready(str(tmp_path / "tokenizer.json"), 400, 64, 1024, 16, 64))
    ended, done = [], threading.Event()

    def chat() -> None:
        try:
            reader._chat_parts(Chat(messages='[{"role": "user", "content": "x"}]'))
        except RequestError as error:
            ended.append(error.kind)

    for _ in range(3):
        reader.later(chat, is_chat=True)
    reader.later(done.set)
    assert done.wait(5)
    begun = time.monotonic()
    reader.close()
    assert time.monotonic() - begun < 8, "the first may have to wait until the process has started"
    assert set(ended) == {ErrorKind.OVERLOADED}
