"""`paged bench` and `paged bench memory` on the command line."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_backend.errors import EngineError
from paged_backend.server.launch import Server, ServerSettings
from paged_client.bench.load import Level, LoadLimits, Prompting
from paged_client.bench.memory import (
    PAGED,
    RESERVED,
    MemoryPlan,
    check_plan,
    draw_memory,
    judge,
    pool_options,
    print_memory,
    run_memory,
)
from paged_client.bench.pool import read_metrics
from paged_client.bench.report import print_report
from paged_client.bench.session import INTERRUPTED, Session, say
from paged_client.bench.sweep import Bench, Plan, Run, sweep
from paged_client.bench.target import Target, check_workload, find_target, split_url, tokens_per_word, usual_metrics_url
from paged_client.bench.workload import Span, Workload
from paged_client.settings import parse_options

_LEAST_REQUESTS = 8
_DRAIN_SECONDS = 2
_CONCURRENCY = "1,8,64"
_MOST_STREAMS = 4096

bench_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelOption = Annotated[
    str, typer.Option("--model", "-m", metavar="FOLDER_OR_HUB_ID", help="What the server that is started serves.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A tunable of the server that is started; repeatable."),
]
InstancesOption = Annotated[
    int | None, typer.Option(metavar="N", min=1, max=64, help="Front ends of the server that is started.")
]
NameOption = Annotated[str, typer.Option(metavar="NAME", help="What the server calls the model.")]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="FOLDER",
        help="Where results.json, results.csv and pictures go; default: a new one here, named by date and time.",
    ),
]
SeedOption = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, help="The same seed sends requests of the same lengths; their tokens are new each time."
    ),
]
TimeoutOption = Annotated[
    float, typer.Option(metavar="SECONDS", min=1, help="The longest that one run may take; it is then broken off.")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=64,
        help="perf_analyzer processes that share the load; default: one for each 64 streams while a quarter of the "
        "cores allows.",
    ),
]
PlotsOption = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw pictures (needs matplotlib).")]
TemperatureOption = Annotated[float, typer.Option(metavar="T", min=0, max=2, help="Of the sampling; 0 is greedy.")]


@bench_app.callback()
def bench(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="gRPC of a running server; without it one is started for the time."),
    ] = None,
    model_name: NameOption = "paged_llm",
    metrics_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The server's Prometheus page; default: port 8002 of the same host, /metrics."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="gRPC of a second server, measured in alternation with the first."),
    ] = None,
    against_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The second server's model; default: --model-name.")
    ] = None,
    against_metrics_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The second server's Prometheus page; default: port 8002 if it is another host."
        ),
    ] = None,
    model: ModelOption = "demo",
    options: SetOption = None,
    instances: InstancesOption = None,
    concurrency: Annotated[
        str | None,
        typer.Option("--concurrency", "-c", metavar="N,N,…", help="Streams at once, one run each; default: 1,8,64."),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option("--rates", "-r", metavar="R,R,…", help="Instead: requests a second at random (Poisson) times."),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            "--requests",
            "-n",
            metavar="N",
            min=1,
            help="Requests a run; default: 4 for each stream, or --seconds of a rate; 8 at least.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", min=1, help="How long requests are sent at each of --rates.")
    ] = 30.0,
    input_tokens: Annotated[
        str, typer.Option(metavar="N or LOW:HIGH", help="Length of prompts: fixed, or uniform in a range.")
    ] = "128",
    output_tokens: Annotated[
        str, typer.Option(metavar="N or LOW:HIGH", help="Length of answers (max_tokens with ignore_eos).")
    ] = "256",
    sharegpt: Annotated[
        bool, typer.Option("--sharegpt", help="ShareGPT-like lengths instead: log-normal, means 161 in and 338 out.")
    ] = False,
    longest: Annotated[
        int,
        typer.Option(
            metavar="N", min=2, help="With --sharegpt: the longest prompt plus answer; each is cut at half of it."
        ),
    ] = 2048,
    shared_prefix: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens in front of every prompt that are the same for all.")
    ] = 0,
    prefixes: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many different shared prefixes there are, used in turn.")
    ] = 1,
    temperature: TemperatureOption = 0.0,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=99, help="Runs of each level; the tables show the one with the median tokens/s."
        ),
    ] = 1,
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="Send some requests first that are not measured.")
    ] = True,
    processes: ProcessesOption = None,
    timeout: TimeoutOption = 600.0,
    seed: SeedOption = 0,
    plots: PlotsOption = True,
    out: OutOption = None,
) -> None:
    """Measure what a server gives its clients, with NVIDIA's perf_analyzer over streaming gRPC.

    Prints tables and writes JSON, CSV and pictures. perf_analyzer is taken from PATH, or brought from the tritonclient
    wheel into ~/.cache/paged. Every request asks for an exact number of tokens, and one that brings another number
    counts as an error.
    """
    if context.invoked_subcommand is not None:
        return
    with _one_sentence_on_failure():
        if rates is not None and concurrency is not None:
            raise EngineError("--rates and --concurrency: give one of them")
        workload = _workload(
            sharegpt, longest, (input_tokens, output_tokens), (shared_prefix, prefixes), temperature, seed
        )
        plan = Plan(_levels(concurrency, rates, requests, seconds), workload, repeats, warm_up)
        if url is None:
            settings = ServerSettings(
                model, parse_options(options or []), model_name, instances, drain_seconds=_DRAIN_SECONDS
            )
        else:
            settings = None
            _refuse_with_url({"--model": model != "demo", "--set": bool(options), "--instances": instances is not None})
        with Session(out or _default_folder("paged-bench"), plots, _limits(processes, timeout)) as session:
            _run_sweep(
                session,
                plan,
                settings,
                _Addresses(url, model_name, metrics_url, against, against_model, against_metrics_url),
            )


@bench_app.command()
def memory(
    context: typer.Context,
    model: ModelOption = "demo",
    options: SetOption = None,
    instances: InstancesOption = None,
    max_model_len: Annotated[
        int,
        typer.Option(
            metavar="N", min=32, help="Longest sequence; a reserved sequence holds room for that many tokens."
        ),
    ] = 2048,
    page_size: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens a page of the paged pool.")] = 16,
    pool_sequences: Annotated[
        int, typer.Option(metavar="N", min=1, help="KV memory of both, in sequences of --max-model-len.")
    ] = 8,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates",
            "-r",
            metavar="R,R,…",
            help="Requests a second; default: 0.5 to 6 times what the reserved pool can take.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="S", min=1, help="How long requests are sent at each rate.")] = 30.0,
    latency_limit: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            min=0.001,
            help="p90 latency at which tokens/s are compared; default: twice the lowest of the reserved pool.",
        ),
    ] = None,
    temperature: TemperatureOption = 0.0,
    processes: ProcessesOption = None,
    timeout: TimeoutOption = 600.0,
    seed: SeedOption = 0,
    plots: PlotsOption = True,
    out: OutOption = None,
) -> None:
    """Compare paged KV memory with reservation, on real traffic of ShareGPT-like lengths.

    Starts the same server twice with the same bytes of KV memory: once with page_size = max_model_len, so that every
    sequence reserves room for the longest one, once with small pages. Sends the same requests at rising rates and shows
    what memory holds, how many sequences run at once, tokens/s and latency.
    """
    with _one_sentence_on_failure():
        if context.parent is not None and any(_is_given(context.parent, name) for name in context.parent.params):
            raise EngineError("options of paged bench memory go behind the word memory")
        settings = ServerSettings(model, parse_options(options or []), instances=instances)
        workload = Workload(
            None, None, longest=max_model_len, temperature=temperature, seed=seed, nonce=secrets.randbits(32)
        )
        wanted = None if rates is None else sorted(_numbers("--rates", rates))
        plan = MemoryPlan(settings, page_size, max_model_len, pool_sequences, wanted, seconds, latency_limit, workload)
        check_plan(plan)
        with Session(out or _default_folder("paged-bench-memory"), plots, _limits(processes, timeout)) as session:
            _run_memory(session, plan)


@dataclass(frozen=True)
class _Addresses:
    """What the command line says on where to measure."""

    url: str | None
    model_name: str
    metrics_url: str | None
    against: str | None
    against_model: str | None
    against_metrics_url: str | None


def _run_sweep(session: Session, plan: Plan, settings: ServerSettings | None, addresses: _Addresses) -> None:
    for option, value in (
        ("--against-model", addresses.against_model),
        ("--against-metrics-url", addresses.against_metrics_url),
    ):
        if addresses.against is None and value is not None:
            raise EngineError(f"{option} {value}: goes with --against, the second server's address")
    runs: list[Run] = []
    with session.measuring(runs), ExitStack() as stack:
        if settings is not None:
            server = stack.enter_context(Server(settings, session.keep)).addresses
            addresses = replace(addresses, url=server.grpc_url, metrics_url=server.metrics_url)
        targets = _targets(addresses)
        prompting = _prompting(targets)
        for target in targets:
            check_workload(target, plan.workload, as_ids=prompting.as_ids, per_word=prompting.tokens_per_word)
        sweep(Bench(session.tool, prompting, session.limits), plan, targets, session.console, runs)
    facts = session.facts(
        plan.workload, prompting, {target.name: f"{target.model_name} at {target.url}" for target in targets}
    )
    print_report(session.console, facts, runs)
    pictures: list[Path] = []
    if session.plots:
        from paged_client.bench.plots import draw

        pictures = draw(session.folder, runs, f"{plan.workload.describe()}; {facts.machine}")
    session.finish(facts, runs, pictures)


def _run_memory(session: Session, plan: MemoryPlan) -> None:
    prompting = Prompting(as_ids=True, tokens_per_word=1.0, count_tokens=True)
    runs: list[Run] = []
    with session.measuring(runs):
        run_memory(plan, Bench(session.tool, prompting, session.limits), session.console, session.keep, runs)
    verdict = judge(runs, plan.latency_limit)
    print_memory(session.console, runs, verdict)
    facts = session.facts(plan.workload, prompting, {kind: str(pool_options(plan, kind)) for kind in (RESERVED, PAGED)})
    pictures: list[Path] = []
    if session.plots and any(run.figures for run in runs):
        title = (
            f"{plan.workload.describe()}; KV memory of {plan.pool_sequences} sequences of {plan.max_model_len:,} "
            f"tokens; {facts.machine}"
        )
        pictures = [draw_memory(session.folder / "memory.png", runs, verdict, title)]
    session.finish(facts, runs, pictures, verdict=None if verdict is None else asdict(verdict))


def _targets(addresses: _Addresses) -> list[Target]:
    """The server, and the one to compare it with."""
    assert addresses.url is not None
    name = addresses.model_name
    metrics_url = addresses.metrics_url or usual_metrics_url(split_url("--url", addresses.url))
    targets = [
        find_target(name, addresses.url, name, url_option="--url", model_option="--model-name", metrics_url=metrics_url)
    ]
    if addresses.against is not None:
        other = addresses.against_model or name
        usual = usual_metrics_url(split_url("--against", addresses.against))
        # two servers of one host have two pages
        second_url = addresses.against_metrics_url or (usual if usual != metrics_url else None)
        shown = other if other != name else f"{other} (2)"
        targets.append(
            find_target(
                shown,
                addresses.against,
                other,
                url_option="--against",
                model_option="--against-model",
                metrics_url=second_url,
            )
        )
    for target in targets:
        if target.metrics_url is None or not read_metrics(target.metrics_url, target.model_name):
            say(
                f"paged: {target.name}: no metrics at {target.metrics_url or 'an address known to us'}, so no "
                "pool figures and no progress within a run"
            )
    return targets


def _prompting(targets: Sequence[Target]) -> Prompting:
    """The most exact way that all targets know."""
    as_ids = all(target.takes_ids for target in targets)
    counting = next((target for target in targets if target.counts_prompts), targets[0])
    per_word = 1.0 if as_ids else tokens_per_word(counting)
    return Prompting(as_ids, per_word, all(target.counts_tokens for target in targets))


def _workload(
    sharegpt: bool, longest: int, lengths: tuple[str, str], prefixes: tuple[int, int], temperature: float, seed: int
) -> Workload:
    prompt, answer = Span.parse("--input-tokens", lengths[0]), Span.parse("--output-tokens", lengths[1])
    if prefixes[1] > 1 and not prefixes[0]:
        raise EngineError(f"--prefixes {prefixes[1]}: goes with --shared-prefix, their length")
    return Workload(
        None if sharegpt else prompt,
        None if sharegpt else answer,
        longest,
        *prefixes,
        temperature,
        seed,
        secrets.randbits(32),
    )


def _levels(
    concurrency: str | None, rates: str | None, requests: int | None, seconds: float
) -> list[tuple[Level, int]]:
    """Levels in the order given, each with its number of requests."""
    levels = []
    for rate in _numbers("--rates", rates) if rates is not None else ():
        if requests is not None and requests < rate:
            raise EngineError(f"--requests {requests}: expected a second's worth of the rate ({rate:g}), or more")
        levels.append((Level(rate=rate), requests or max(ceil(rate * seconds), _LEAST_REQUESTS)))
    if levels:
        return levels
    for value in _numbers("--concurrency", concurrency or _CONCURRENCY):
        streams = int(value)
        if streams != value or streams > _MOST_STREAMS:
            raise EngineError(f"--concurrency {value:g}: expected whole numbers from 1 to {_MOST_STREAMS}")
        if requests is not None and requests < streams:
            raise EngineError(f"--requests {requests}: expected as many as there are streams ({streams}), or more")
        levels.append((Level(streams=streams), requests or max(4 * streams, _LEAST_REQUESTS)))
    return levels


def _numbers(option: str, text: str) -> list[float]:
    """ "1,8,64" as distinct positive numbers."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise EngineError(f"{option} {text}: expected numbers with commas between them, such as 1,8,64") from None
    if not all(0 < number < float("inf") for number in numbers):
        raise EngineError(f"{option} {text}: expected numbers above 0")
    return list(dict.fromkeys(numbers))


def _refuse_with_url(given: dict[str, bool]) -> None:
    for option, is_given in given.items():
        if is_given:
            raise EngineError(
                f"{option}: is for a server that paged bench starts, and --url names one that runs already"
            )


def _is_given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _limits(processes: int | None, timeout: float) -> LoadLimits:
    return LoadLimits(processes, timeout, len(os.sched_getaffinity(0)))


def _default_folder(name: str) -> Path:
    return Path(f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")


@contextmanager
def _one_sentence_on_failure() -> Iterator[None]:
    """Failures end the command with a sentence; SIGTERM ends it as Ctrl-C does, so that nothing that was started is
    left running.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except EngineError as error:
        sys.stdout.flush()
        say(f"paged: error: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("paged: interrupted")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGTERM, before)
