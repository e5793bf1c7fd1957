"""Renders chat templates where they can harm nobody: `python -m paged_backend.frontend.template_process`, a child of a
front end (template_renderer.py).

A template is a program that comes with a checkpoint: it may run for ever, or ask for more memory than there is, and
Python does not stop when asked. This process is killed instead. transformers renders, without torch (its
`chat_template_utils` needs none). Requests come on stdin, answers go to stdout, each a JSON message after its length (4
bytes, little-endian).
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import IO, Any

import msgspec

MAX_MEMORY_BYTES = 2**30  # that a rendering may take, beyond what the process has at its start
_PR_SET_PDEATHSIG = 1


class Rendering(msgspec.Struct, frozen=True, kw_only=True):
    """What to render."""

    template: str
    messages: list[Any]
    tools: list[Any] | None
    add_generation_prompt: bool
    continue_final_message: bool
    variables: dict[str, Any]
    max_bytes: int  # that the text may have


class Rendered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The text, or why there is none."""

    text: str = ""
    error: str = ""


def render_here(rendering: Rendering) -> Rendered:
    """Raises nothing: a template may raise anything, and every bit of it was caused by what the caller sent."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts: Any = render_jinja_template(  # (one text a conversation, something about each)
            conversations=[rendering.messages],
            tools=rendering.tools,
            chat_template=rendering.template,
            add_generation_prompt=rendering.add_generation_prompt,
            continue_final_message=rendering.continue_final_message,
            **rendering.variables,
        )
        text: str = texts[0][0]
        num_bytes = len(text.encode())
    except MemoryError:
        return Rendered(error=too_large())
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Rendered(error=(lines or [type(error).__name__])[0][:500])
    if num_bytes > rendering.max_bytes:
        return Rendered(
            error=f"it makes a text of {num_bytes} bytes of them; the longest allowed is {rendering.max_bytes}"
        )
    return Rendered(text=text)


def too_large() -> str:
    return f"it needs more than {MAX_MEMORY_BYTES // 2**20} MiB of memory"


def send(stream: IO[bytes], message: msgspec.Struct) -> None:
    encoded = msgspec.json.encode(message)
    stream.write(len(encoded).to_bytes(4, "little") + encoded)
    stream.flush()


_FIRST = Rendering(
    template="{% for message in messages %}{{ message.content }}{% endfor %}",
    messages=[{"role": "user", "content": ""}],
    tools=None,
    add_generation_prompt=True,
    continue_final_message=False,
    variables={},
    max_bytes=0,
)


def _bound_memory() -> None:
    """RLIMIT_DATA, not RLIMIT_AS: libraries reserve addresses that they never use."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found is not None
    limit = int(found[1]) * 1024 + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print must not spoil an answer
    render_here(_FIRST)  # which loads all that the first caller would wait for
    _bound_memory()
    send(answers, Rendered())  # ready
    requests = sys.stdin.buffer
    while len(head := requests.read(4)) == 4:
        send(answers, render_here(msgspec.json.decode(requests.read(int.from_bytes(head, "little")), type=Rendering)))
    return 0


if __name__ == "__main__":
    os._exit(main())
