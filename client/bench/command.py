"""`paged bench` and `paged bench memory` on the command line."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from paged_backend.errors import EngineError
from paged_backend.server.launch import Server, ServerSettings
from paged_client.bench.load import Prompting
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
from paged_client.bench.options import (
    Addresses,
    LoadOptions,
    PoolOptions,
    SessionOptions,
    StartedServer,
    TemperatureOption,
    TrafficOptions,
    numbers_of,
)
from paged_client.bench.pool import read_metrics
from paged_client.bench.report import print_report
from paged_client.bench.session import INTERRUPTED, Session, say
from paged_client.bench.sweep import Bench, Plan, Run, sweep
from paged_client.bench.target import Target, check_workload, find_target, split_url, tokens_per_word, usual_metrics_url
from paged_client.bench.workload import Workload
from paged_client.option_groups import with_option_groups

_DRAIN_SECONDS = 2

bench_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench_app.callback()
@with_option_groups
def bench(
    *,
    context: typer.Context,
    addresses: Addresses,
    started: StartedServer,
    load: LoadOptions,
    traffic: TrafficOptions,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=99, help="Runs of each level; the tables show the one with the median tokens/s."
        ),
    ] = 1,
    warm_up: Annotated[
        bool, typer.Option("--warm-up/--no-warm-up", help="Send some requests first that are not measured.")
    ] = True,
    results: SessionOptions,
) -> None:
    """Measure what a server gives its clients, with NVIDIA's perf_analyzer over streaming gRPC.

    Prints tables and writes JSON, CSV and pictures. perf_analyzer is taken from PATH, or brought from the tritonclient
    wheel into ~/.cache/paged. Every request asks for an exact number of tokens, and one that brings another number
    counts as an error.
    """
    if context.invoked_subcommand is not None:
        return
    with _one_sentence_on_failure():
        workload = traffic.workload(results.seed)
        plan = Plan(load.levels(), workload, repeats, warm_up)
        settings = None
        if addresses.url is None:
            settings = replace(started.settings(), model_name=addresses.model_name, drain_seconds=_DRAIN_SECONDS)
        else:
            started.refuse_with_url()
        with results.session("paged-bench") as session:
            _run_sweep(session, plan, settings, addresses)


@bench_app.command(short_help="Compare paged KV memory with reservation.")
@with_option_groups
def memory(
    *,
    context: typer.Context,
    started: StartedServer,
    pool: PoolOptions,
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
    results: SessionOptions,
) -> None:
    """Compare paged KV memory with reservation, on real traffic of ShareGPT-like lengths.

    Starts the same server twice with the same bytes of KV memory: once with page_size = max_model_len, so that every
    sequence reserves room for the longest one, once with small pages. Sends the same requests at rising rates and shows
    what memory holds, how many sequences run at once, tokens/s and latency.
    """
    with _one_sentence_on_failure():
        if context.parent is not None and any(_is_given(context.parent, name) for name in context.parent.params):
            raise EngineError("options of paged bench memory go behind the word memory")
        workload = Workload(
            None,
            None,
            longest=pool.max_model_len,
            temperature=temperature,
            seed=results.seed,
            nonce=secrets.randbits(32),
        )
        settings = started.settings()
        plan = MemoryPlan(
            settings,
            pool.page_size,
            pool.max_model_len,
            pool.pool_sequences,
            None if rates is None else sorted(numbers_of("--rates", rates)),
            seconds,
            latency_limit,
            workload,
        )
        check_plan(plan)
        with results.session("paged-bench-memory") as session:
            _run_memory(session, plan)


def _run_sweep(session: Session, plan: Plan, settings: ServerSettings | None, addresses: Addresses) -> None:
    addresses.check()
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


def _targets(addresses: Addresses) -> list[Target]:
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


def _is_given(context: Any, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


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
