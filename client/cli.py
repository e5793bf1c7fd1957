"""The `paged` command: `paged serve` and `paged demo`."""

from __future__ import annotations

import importlib.metadata
import json
import locale
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import Console

from paged_backend.errors import EngineError
from paged_backend.server.launch import FrontEndsLostError, Server, ServerSettings
from paged_client.bench.command import bench_app
from paged_client.chat import chat
from paged_client.demo import DEMO_PROMPT, run_demo, run_demo_twice
from paged_client.generate import generate
from paged_client.models import models
from paged_client.openai.command import serve_openai
from paged_client.option_groups import with_option_groups
from paged_client.own_server import running
from paged_client.settings import parse_options
from paged_client.top.command import top

_WAIT_SECONDS = 0.2

_MAX_RESTARTS = 4  # of servers that lost front ends; as max_engine_restarts
_RESTART_WINDOW_SECONDS = 600.0


class OnFrontEndDeath(str, Enum):
    """What `paged serve` does when a front end has died."""

    EXIT = "exit"
    RESTART = "restart"


app = typer.Typer(
    name="paged",
    help="Large language models on NVIDIA Triton Inference Server, from a paged KV pool.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="FOLDER_OR_HUB_ID",
        help="Checkpoint: a folder, or an id on the Hugging Face hub; 'demo' comes with paged.",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Any tunable of config.pbtxt, such as page_size=32 or max_model_len=8192; repeatable.",
    ),
]
Verbose = Annotated[bool, typer.Option("--log-verbose", "-v", help="Show tritonserver's own log too.")]


def _port(service: str) -> Any:
    return typer.Option(metavar="PORT", min=0, max=65535, help=f"{service}; 0: a free one.")


def main() -> None:
    _speak_utf8()
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - it stays open as long as the process
    app()


def _speak_utf8() -> None:
    """Begins anew in Python's UTF-8 mode where the locale has another encoding: models, prompts and answers are UTF-8,
    and so are what we say and read.
    """
    if (
        not sys.flags.utf8_mode
        and "utf" not in locale.getpreferredencoding(False).lower()
        and os.environ.get("PYTHONUTF8") != "1"
    ):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"paged {importlib.metadata.version('paged-backend')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@dataclass(frozen=True)
class _ListenOptions:
    """Where `paged serve` can be reached."""

    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen: IPv4 address or name; 0.0.0.0: every network.")
    ] = "127.0.0.1"
    http_port: Annotated[int, _port("HTTP")] = 8000
    grpc_port: Annotated[int, _port("gRPC")] = 8001
    metrics_port: Annotated[int, _port("Prometheus metrics")] = 8002


@dataclass(frozen=True)
class _ServingOptions:
    """How `paged serve` serves, starts and stops."""

    model_name: Annotated[str, typer.Option(metavar="NAME", help="What clients call the model.")] = "paged_llm"
    instances: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, max=64, help="Front ends (they tokenise and stream) on the one engine; default: 4."
        ),
    ] = None
    drain_seconds: Annotated[
        int, typer.Option(metavar="SECONDS", min=0, help="How long a stop waits for requests in flight.")
    ] = 30
    on_front_end_death: Annotated[
        OnFrontEndDeath,
        typer.Option(
            help="When tritonserver or one of its front ends dies: exit with code 1, for an orchestrator; or restart "
            "the server."
        ),
    ] = OnFrontEndDeath.EXIT


@app.command(context_settings={"allow_extra_args": True})
@with_option_groups
def serve(
    *,
    context: typer.Context,
    model: Model = "demo",
    options: Settings = None,
    listening: _ListenOptions,
    serving: _ServingOptions,
    log_verbose: Verbose = False,
) -> None:
    """Serve a model over HTTP and gRPC until Ctrl-C.

    Uses the tritonserver on PATH if there is one, else the one of the package nvidia-pytriton, which the extra `serve`
    brings. Listens on this machine only, unless --host says otherwise.

    Ctrl-C or SIGTERM waits for the requests in flight and exits with 0; a second Ctrl-C hurries.

    Arguments after -- go to tritonserver as they are, such as
    paged serve -- --log-verbose=1
    """
    if not model:
        raise typer.BadParameter("it is empty", param_hint="--model")
    if context.args and not context.args[0].startswith("-"):
        raise typer.BadParameter(
            f"'{context.args[0]}' is no option: a model is named with --model", param_hint="arguments"
        )
    settings = ServerSettings(
        model=model,
        options=parse_options(options or []),
        model_name=serving.model_name,
        instances=serving.instances,
        **asdict(listening),
        drain_seconds=serving.drain_seconds,
        show_log=log_verbose,
        arguments=tuple(context.args),
    )
    with _one_sentence_on_failure():
        if serving.on_front_end_death is OnFrontEndDeath.EXIT:
            _serve(settings)
        else:
            _serve_again_and_again(settings)


def _serve(settings: ServerSettings) -> None:
    """Until it is stopped.

    Raises:
        EngineError: why it ended although nobody stopped it.
    """
    with running(settings) as server:
        print(ready_text(server), flush=True)
        while server.wait(_WAIT_SECONDS) is None and not server.stopping:
            pass


def _serve_again_and_again(settings: ServerSettings) -> None:
    """A server that lost front ends is replaced by another at the same ports, `_MAX_RESTARTS` times within
    `_RESTART_WINDOW_SECONDS`.

    The model alone cannot be loaded anew: Triton Server does not unload it while it waits for the requests that died
        with the front end.
    """
    restarts: list[float] = []
    while True:
        try:
            _serve(settings)
            return
        except FrontEndsLostError as error:
            now, at = time.monotonic(), error.addresses
            settings = replace(settings, http_port=at.http_port, grpc_port=at.grpc_port, metrics_port=at.metrics_port)
            restarts = [*(restart for restart in restarts if now - restart < _RESTART_WINDOW_SECONDS), now]
            if len(restarts) > _MAX_RESTARTS:
                raise EngineError(
                    f"{error}; it was started again {_MAX_RESTARTS} times within "
                    f"{_RESTART_WINDOW_SECONDS / 60:.0f} minutes"
                ) from None
            print(
                f"paged: {error}: restart {len(restarts)} of at most {_MAX_RESTARTS} within "
                f"{_RESTART_WINDOW_SECONDS / 60:.0f} minutes",
                file=sys.stderr,
            )


@app.command(short_help="See it work: a story and questions about it.")
def demo(
    model: Model = "demo",
    options: Settings = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="A text to continue, instead of the conversation."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer in tokens.")] = 200,
    tools: Annotated[
        bool,
        typer.Option("--tools", help="Let the model think and call functions, through the gateway for OpenAI's API."),
    ] = False,
    speculation: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="The same with guesses, such as those of the model's draft head (eagle3), and again without them.",
        ),
    ] = None,
    log_verbose: Verbose = False,
) -> None:
    """See it work: start a server on free ports, ask for a story and questions about it, print speed and memory use,
    stop.

    With --speculation eagle3 the draft head that comes with the model guesses what comes next. Then a second server is
    asked the same without guesses, and told is what they saved.

    With --tools it starts the gateway, too, and asks through OpenAI's own library what needs a calculator, a list of
    towns, or neither. Nothing but functions that come with paged is run.

    Needs no GPU and no download: the small model comes with paged. Ctrl-C stops it.
    """
    if tools and prompt is not None:
        raise typer.BadParameter("not together with --tools, which asks questions of its own", param_hint="--prompt")
    if tools and speculation is not None:
        raise typer.BadParameter("not together with --tools", param_hint="--speculation")
    if speculation in ("", "off"):
        raise typer.BadParameter("name what guesses, such as eagle3, ngram or auto", param_hint="--speculation")
    settings = ServerSettings(model=model, options=parse_options(options or []), instances=1, show_log=log_verbose)
    console = Console(highlight=False)
    with _one_sentence_on_failure():
        if speculation is not None:
            run_demo_twice(
                running, settings, speculation, partial(run_demo, prompt=prompt, max_tokens=max_tokens), console
            )
            return
        if not tools:
            with running(settings) as server:
                run_demo(server, prompt, max_tokens, console)
            return
        # imports the gateway's reading of answers, which the story does not need
        from paged_client.demo_agent import check_packages, run_agent_demo

        check_packages()
        with running(settings) as server:
            run_agent_demo(server, max_tokens, console)


app.command()(generate)
app.command()(chat)
app.command("openai", short_help="Speak OpenAI's API for a running server.")(serve_openai)
app.add_typer(bench_app, name="bench", short_help="Measure what a server gives its clients.")
app.command()(top)
app.command(short_help="List the architectures and formats that can be served.")(models)


def ready_text(server: Server) -> str:
    """Where the server answers, and a command to paste."""
    addresses = server.addresses
    question = {"text_input": DEMO_PROMPT, "max_tokens": 64, "stream": True, "exclude_input_in_output": True}
    url = f"{addresses.http_url}/v2/models/{server.settings.model_name}/generate_stream"
    return "\n".join(
        [
            f"paged: ready, serving {server.settings.model_name} on {server.settings.host}",
            f"  HTTP     {addresses.http_url}",
            f"  gRPC     {addresses.grpc_url}",
            f"  metrics  {addresses.metrics_url}",
            "",
            f"  curl -N {url} -d {shlex.quote(json.dumps(question))}",
            "",
            "Ctrl-C stops it.",
        ]
    )


@contextmanager
def _one_sentence_on_failure() -> Iterator[None]:
    try:
        yield
    except EngineError as error:
        sys.stdout.flush()
        print(f"paged: error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except BrokenPipeError:  # the library's business
        raise
    except OSError as error:  # a full disk, ulimit -f
        where = f"'{error.filename}'" if error.filename else "a file"
        print(f"paged: error: {where} cannot be used: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
