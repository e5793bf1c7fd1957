"""`paged generate`: one prompt, its answer as it arrives."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from paged_client.answers import Answer
from paged_client.asking import (
    Sampling,
    SamplingOptions,
    ServerOptions,
    Speed,
    one_sentence_on_failure,
    printable,
    sampling_of,
)
from paged_client.client import PagedClient
from paged_client.ctrl_c import CtrlC
from paged_client.option_groups import with_option_groups


@with_option_groups
def generate(
    *,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What the model continues; without it, standard input.", show_default=False
        ),
    ] = None,
    server: ServerOptions,
    named: SamplingOptions,
    options: Sampling = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole answer as one JSON object.")] = False,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.001, help="How long the whole answer may take.")
    ] = 600.0,
) -> None:
    """Stream one answer of a running server.

    The text goes to standard output and nothing else does; the line on tokens and speed goes to standard error if that
    is a terminal. Ctrl-C cancels the request on the server.
    """
    sampling = sampling_of(named, options)
    with one_sentence_on_failure():
        text = _read_prompt() if prompt is None else prompt
        with PagedClient(server.url, model=server.model_name, timeout=timeout) as client:
            if as_json:
                print(json.dumps(_members_of(client.generate(text, **sampling)), ensure_ascii=False))
            elif sampling.get("n", 1) != 1:  # several at once cannot be read
                print("\n\n".join(printable(sequence.text) for sequence in client.generate(text, **sampling).sequences))
            else:
                _print_stream(client, text, sampling)


def _read_prompt() -> str:
    if sys.stdin.isatty():
        print("the prompt, until Ctrl-D:", file=sys.stderr)
    return sys.stdin.read().removesuffix("\n")


def _members_of(answer: Answer) -> dict[str, Any]:
    members: dict[str, Any] = {
        "text": answer.text,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "usage": msgspec.structs.asdict(answer.usage),
    }
    if answer.logprobs:
        members["logprobs"] = [[vars(token) for token in entry] for entry in answer.logprobs]
    if answer.prompt_logprobs:
        members["prompt_logprobs"] = [
            None if entry is None else [vars(token) for token in entry] for entry in answer.prompt_logprobs
        ]
    if answer.others:
        members["others"] = [_members_of(other) for other in answer.others]
    return members


def _print_stream(client: PagedClient, text: str, sampling: dict[str, Any]) -> None:
    speed = Speed()
    with CtrlC() as ctrl_c, client.stream(text, **sampling) as deltas, ctrl_c.calls(deltas.stop):
        try:
            for delta in deltas:
                speed.take(delta)
                print(printable(delta.text) if sys.stdout.isatty() else delta.text, end="", flush=True)
        finally:
            if deltas.answer.text:
                print(flush=True)
    if deltas.stopped:
        raise KeyboardInterrupt
    if sys.stderr.isatty():
        Console(stderr=True, highlight=False, markup=False).print(speed.line(), style="dim", soft_wrap=True)
