"""`paged generate`: one prompt, its answer as it arrives."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from paged_client.asking import (
    DEFAULT_MODEL,
    DEFAULT_URL,
    MaxTokens,
    ModelName,
    Sampling,
    Seed,
    Speed,
    Temperature,
    Url,
    one_sentence_on_failure,
    printable,
    sampling_of,
)
from paged_client.client import PagedClient


def generate(
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="What the model continues; without it, standard input.", show_default=False)] = None,
    url: Url = DEFAULT_URL,
    model_name: ModelName = DEFAULT_MODEL,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    options: Sampling = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as one JSON object.")] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="How long the whole answer may take.")] = 600.0,
) -> None:
    """Stream one answer of a running server.

    The text goes to standard output and nothing else does; the line on tokens and speed goes to standard error if that is a terminal.
    Ctrl-C cancels the request on the server.
    """
    sampling = sampling_of(options, max_tokens=max_tokens, temperature=temperature, seed=seed)
    with one_sentence_on_failure():
        text = sys.stdin.read().removesuffix("\n") if prompt is None else prompt
        with PagedClient(url, model=model_name, timeout=timeout) as client:
            if as_json:
                answer = client.generate(text, **sampling)
                print(json.dumps({**vars(answer), "usage": vars(answer.usage)}, ensure_ascii=False))
            else:
                _print_stream(client, text, sampling)


def _print_stream(client: PagedClient, text: str, sampling: dict[str, Any]) -> None:
    speed = Speed()
    with client.stream(text, **sampling) as deltas:
        try:
            for delta in deltas:
                speed.take(delta)
                print(printable(delta.text) if sys.stdout.isatty() else delta.text, end="", flush=True)
        finally:
            if deltas.answer.text:
                print(flush=True)
    if sys.stderr.isatty():
        print(f"\033[2m{speed.line()}\033[0m", file=sys.stderr)
